"""Schedulers and loss scales of DeepSpeed's engines in portable checkpoints, also in those of early versions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support import zero_worlds as zero
from support.worlds import said
from torch.optim.lr_scheduler import LambdaLR, LinearLR, MultiplicativeLR, MultiStepLR, SequentialLR, StepLR

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.checkpoint import schedulers
from sharded_shampoo4.checkpoint.files import read_manifest, write_manifest

KIND = "mlp"
FIRST, THEN = range(2), range(2, 6)
Make = Callable[[Any], Any]


class Decay:
    """A callable object, whose attributes are in the state of a LambdaLR."""

    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, step: int) -> float:
        return float(self.factor) ** step


class Plan:
    """A scheduler of a program. Its state has what JSON has no words for."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.step_count = optimizer, 0
        self.rates, self.taken = {2: (0.1, 0.2), 4: (0.01, 0.02)}, dict[int, float]()

    def step(self) -> None:
        self.step_count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates.get(self.step_count, (group["lr"],))[0] / (1 + sum(k == 1 for k in self.taken))
        self.taken[self.step_count] = self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Refusing(Plan):
    """A scheduler that takes its state only where ``refuses`` is not set, and has half of it by then."""

    refuses = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step_count"]
        if self.refuses and self.step_count == len(FIRST):
            raise KeyError("no such plan")
        super().load_state_dict(state)


def warm_up(then: Make) -> Make:
    """A schedule that ``then`` goes on with after two steps."""
    return lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), then(o)], [2])


def multi_step(optimizer: Any) -> Any:
    return MultiStepLR(optimizer, [1, 3])


def from_configuration(optimizer: Any) -> Any:
    return zero.deepspeed.runtime.lr_schedules.WarmupLR(optimizer, warmup_max_lr=0.01, warmup_num_steps=8)


def start(scheduler: Make | None = None, host: str = "zero1", seed: int = 0, **options: Any) -> Any:
    """An engine; ``dtype`` is that of the model."""
    model = zero.Replay(hosts.make_model(KIND, seed).to(options.pop("dtype", torch.float32)))
    optimizer = Shampoo4(model.named_parameters(), lr=0.01, statistics_interval=3, min_quant_numel=0)
    config = zero.configuration(host, **options)
    engine, *_ = zero.deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    return engine


def train(engine: Any, steps: range) -> list[float]:
    """Replay gradients; returns the learning rates."""
    rates = []
    for step in steps:
        rates.append(engine.get_lr()[0])
        zero.step(engine, {name: g.float() / 64 for name, g in hosts.make_gradients(KIND, step).items()})
    return rates


def as_before(folder: str) -> None:
    """Take away what early versions did not store; collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        manifest = read_manifest(folder)
        del manifest["engine"]["scheduler_class"], manifest["engine"]["dynamic_loss_scale"]
        write_manifest(Path(folder), manifest)
    dist.barrier()


def load(engine: Any, folder: str) -> list[str]:
    """Load a checkpoint; returns what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.load(engine, folder)
    return [str(warning.message) for warning in caught if "scheduler" in str(warning.message)]


# -- schedules that go on ----------------------------------------------------------------------------------------------


GOING_ON: dict[str, Make] = {
    "steps": multi_step,
    "in a sequence": warm_up(multi_step),
    "a callable object": lambda o: LambdaLR(o, Decay(0.5)),
    "DeepSpeed's": from_configuration,
    "the program's": Plan,
}


class Rates(NamedTuple):
    """Learning rates after a save, without a stop and loaded, and what a load has warned of."""

    expected: list[float]
    found: list[float]
    of_early_version: list[float]
    warned: list[str]


def go_on(rank: int, folder: str) -> dict[str, Rates]:
    zero.prepare()
    results = {}
    for name, make in GOING_ON.items():
        place, engine = f"{folder}/{name}", start(make)
        train(engine, FIRST)
        checkpoint.save(engine, place)
        expected = train(engine, THEN)
        other = start(make, seed=1)
        warned = load(other, place)
        found = train(other, THEN)
        as_before(place)
        warned += load(other, place)  # into one that has gone on, too
        results[name] = Rates(expected, found, train(other, THEN), warned)
        other.destroy()
        engine.destroy()
    return results


def test_schedules_go_on(tmp_path: Path) -> None:
    for rank in hosts.run_ranks(2, go_on, str(tmp_path)):
        for name, rates in rank.items():
            assert rates.found == rates.of_early_version == rates.expected, name
            assert len(set(rates.expected)) > 1 and not rates.warned, name


class Pair(NamedTuple):
    low: float
    high: float


def test_states_come_back_with_their_types() -> None:
    plan = Plan(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    vars(plan).update(pair=Pair(1, 2), phases=[{"from": (0, 1)}], counts=Counter([7]))
    before = dict(vars(plan))
    state = {**plan.state_dict(), "taken": {1: 0.5}, "counts": Counter([7, 7, 8]), "step_count": 3}
    vars(plan).update(state)
    saved = schedulers.to_json(plan)
    plan.taken[2] = 0.25  # after the save
    assert saved["taken"] == {"1": 0.5} and saved["counts"] == {"7": 2, "8": 1}
    vars(plan).update(before)
    found = schedulers.from_json(saved, plan)
    assert vars(plan) == before  # the trial leaves no trace
    assert found == {**state, "taken": {1: 0.5}}
    assert type(found["counts"]) is Counter and type(found["pair"]) is Pair
    assert found["phases"][0]["from"] == (0, 1) and found["rates"] == before["rates"]


# -- states that JSON cannot hold --------------------------------------------------------------------------------------


def refuse(rank: int, folder: str) -> tuple[dict[str, str], list[str], list[str]]:
    """What is said, also where one rank only cannot save, and the files before and after."""
    zero.prepare()
    engine = start(multi_step)
    train(engine, FIRST)
    checkpoint.save(engine, folder)
    files = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    heard = {}
    for name, factor, make in (
        ("everywhere", torch.tensor(0.5), LambdaLR),
        ("on rank 1", torch.tensor(0.5) if rank else 0.5, MultiplicativeLR),
    ):
        optimizer = engine.basic_optimizer
        parts: list[Any] = [StepLR(optimizer, 1), make(optimizer, Decay(factor))]
        engine.lr_scheduler = SequentialLR(optimizer, parts, [3])
        heard[name] = said(lambda: checkpoint.save(engine, folder))
    dist.barrier()
    return heard, files, sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for heard, before, after in hosts.run_ranks(2, refuse, str(tmp_path)):
        assert before == after
        for name, kind in (("everywhere", "LambdaLR"), ("on rank 1", "MultiplicativeLR")):
            assert "ValueError: a portable checkpoint stores" in heard[name].replace("rank 1: ", "")
            assert f"SequentialLR(StepLR, {kind})" in heard[name] and "numbers, strings, lists" in heard[name]


# -- schedulers of another kind ----------------------------------------------------------------------------------------


OTHERS: dict[str, tuple[Make, Make, str]] = {
    "of DeepSpeed and torch": (from_configuration, multi_step, "WarmupLR, but DeepSpeed's scheduler is MultiStepLR"),
    "of torch and DeepSpeed": (multi_step, from_configuration, "MultiStepLR, but DeepSpeed's scheduler is WarmupLR"),
    "in a sequence": (
        warm_up(multi_step),
        warm_up(lambda o: StepLR(o, 2)),
        "SequentialLR(LinearLR, MultiStepLR), but DeepSpeed's scheduler is SequentialLR(LinearLR, StepLR)",
    ),
}


def begin_anew(rank: int, folder: str) -> dict[str, Any]:
    """What is warned of, and what has moved; at last, a scheduler that does not take its state on one rank."""
    zero.prepare()
    results: dict[str, Any] = {}
    for name, (make, make_other, _) in OTHERS.items():
        place, engine = f"{folder}/{name}", start(make)
        train(engine, FIRST)
        checkpoint.save(engine, place)
        expected, results[name] = zero.full_parameters(engine), []
        engine.destroy()
        for early in (False, True):
            if early:
                as_before(place)
            other = start(make_other, seed=1)
            before = schedulers.to_json(other.lr_scheduler)
            warned = load(other, place)
            found = zero.full_parameters(other)
            same = all(torch.equal(found[key], expected[key]) for key in expected)
            results[name].append((warned, same, schedulers.to_json(other.lr_scheduler) == before, other.global_steps))
            train(other, THEN)
            other.destroy()
    engine = start(Refusing)
    train(engine, FIRST)
    checkpoint.save(engine, f"{folder}/refusing")
    other = start(Refusing, seed=1)
    other.lr_scheduler.refuses = rank == 1
    train(other, range(1))

    def everything() -> tuple[Any, ...]:
        states = [t for state in other.basic_optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        tensors = zero.full_parameters(other) | {f"state {number}": state for number, state in enumerate(states)}
        return hosts.digest(tensors), other.global_steps, other.get_lr(), schedulers.to_json(other.lr_scheduler)

    unchanged = everything()
    results["heard"] = said(lambda: checkpoint.load(other, f"{folder}/refusing"))
    results["unchanged"] = everything() == unchanged
    return results


def test_a_scheduler_of_another_kind_begins_anew(tmp_path: Path) -> None:
    for rank in hosts.run_ranks(2, begin_anew, str(tmp_path)):
        for name, (_, _, kinds) in OTHERS.items():
            for (warned, *moved), words in zip(rank[name], (kinds, "with other keys, but"), strict=True):
                assert moved == [True, True, len(FIRST)], name
                assert len(warned) == 1 and words in warned[0] and "begins anew" in warned[0], (name, warned)
        heard = rank["heard"].replace("rank 1: ", "")
        assert "ValueError: DeepSpeed's scheduler Refusing does not take its state" in heard and "no such plan" in heard
        assert rank["unchanged"]


# -- loss scales -------------------------------------------------------------------------------------------------------


def fp16(**options: Any) -> dict[str, Any]:
    return {"dtype": torch.float16, "fp16": {"enabled": True, **options}}


FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("zero1", {}),
    "bf16": ("zero2", {"dtype": torch.bfloat16, "bf16": {"enabled": True}}),
    "bf16, stage 0": ("zero0", {"dtype": torch.bfloat16, "bf16": {"enabled": True}}),
    "fp16": ("zero3", fp16(loss_scale=8.0)),
    "fp16, stage 0": ("zero0", fp16(loss_scale=8.0)),
}


def scale(rank: int, folder: str) -> dict[str, list[float]]:
    """The scales of engines that have loaded, new files and early ones in turn."""
    zero.prepare()
    zero.pretend_fp16()
    results = {}
    dynamic = [start(host=host, **fp16(initial_scale_power=10)) for host in ("zero2", "zero0")]
    fixed = start(host="zero2", **fp16(loss_scale=4.0))

    def loaded(engines: list[Any], folder: str) -> list[float]:
        scales = []
        for early in (False, True):
            if early:
                as_before(folder)
            for engine in engines:
                before = engine.optimizer.loss_scale
                load(engine, folder)
                scales.append(engine.optimizer.loss_scale)
                engine.optimizer.loss_scale = before
        return scales

    for name, (host, options) in FIXED.items():
        engine = start(host=host, **options)
        checkpoint.save(engine, f"{folder}/{name}")
        results[name] = loaded(dynamic, f"{folder}/{name}")
    for name, first in zip(("dynamic", "dynamic, stage 0"), dynamic, strict=True):
        first.optimizer.loss_scale = 64.0
        checkpoint.save(first, f"{folder}/{name}")
        others = [start(host=host, **fp16(initial_scale_power=10)) for host in ("zero1", "zero0")]
        results[name] = loaded([*others, fixed], f"{folder}/{name}")
    return results


def test_only_dynamic_loss_scales_move(tmp_path: Path) -> None:
    for rank in hosts.run_ranks(2, scale, str(tmp_path)):
        for name in FIXED:
            assert rank[name] == [1024.0] * 4, name
        for name in ("dynamic", "dynamic, stage 0"):
            assert rank[name] == [64.0, 64.0, 4.0, 64.0, 64.0, 4.0], name


@pytest.mark.parametrize("early", [False, True])
def test_states_of_schedulers_are_told_apart(early: bool) -> None:
    """By the kind or, in early versions, by keys, of which torch's versions add some."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)

    def saved(make: Make) -> dict[str, Any]:
        scheduler = make(optimizer)
        state = {"_of_another_version": 1, **schedulers.to_json(scheduler)}
        return {"scheduler": state, **({} if early else {"scheduler_class": schedulers.kind(scheduler)})}

    makes = [multi_step, from_configuration, warm_up(multi_step), warm_up(from_configuration), Plan]
    for there, make in enumerate(makes):
        for here, other in enumerate(makes):
            assert schedulers.is_of(saved(make), other(optimizer)) == (there == here)
