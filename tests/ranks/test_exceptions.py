"""An exception on one rank: every rank raises, none waits for ever, and no parameter has changed."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support.contract import PATIENCE, SMALL_BLOCKS
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharded_shampoo4 import Shampoo4, checkpoint, distributor
from sharded_shampoo4.comm.exchange import Exchange
from sharded_shampoo4.distributor import Distributor
from sharded_shampoo4.grafting import Grafting
from sharded_shampoo4.numerics import linalg
from sharded_shampoo4.numerics.factors import FactorPool
from sharded_shampoo4.numerics.moments import MomentPool
from sharded_shampoo4.numerics.preconditioner import Preconditioner
from sharded_shampoo4.planning.copies import Copies
from sharded_shampoo4.updates import Updates

OPTIONS: dict[str, Any] = {**SMALL_BLOCKS, "scratch_mib": 1}


class Peculiar(Exception):
    """Cannot be made of a message, nor pickled."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"peculiar {left} {right}")


ERRORS: dict[str, Callable[[], Exception]] = {
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "runtime": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED"),
    "key": lambda: KeyError("lost"),
    "peculiar": lambda: Peculiar(1, 2),
}

# Where something may fail in a step: the name of a function, and which of its calls fails.
PLACES: dict[str, tuple[Any, str, int]] = {
    "first batch": (Distributor, "_directions", 0),
    "last batch": (Distributor, "_directions", -1),
    "statistics": (FactorPool, "absorb", 0),
    "roots": (FactorPool, "_commit_roots", 0),
    "products": (Preconditioner, "precondition", 1),
    "gradients that stay": (Copies, "run", 0),
    "packing": (Exchange, "_pack", 0),
    "writing": (torch, "_foreach_copy_", 0),
    "writing the last": (torch, "_foreach_copy_", -1),
    "norms": (Grafting, "note", 0),
    "scaling": (Grafting, "_scale", 0),
    "a gradient's view": (Distributor, "_gradient_shard", 0),
    "failures": (Preconditioner, "failure", 0),
    "soap, statistics": (FactorPool, "turn", -1),
    "soap, momentum": (MomentPool, "rotate", 0),
    "soap, directions": (MomentPool, "direct", -1),
}

CASES = [*((place, "memory") for place in PLACES), *(("last batch", kind) for kind in ("runtime", "key", "peculiar"))]


class Fault:
    """Lets a call of a function fail once it is armed: by its number, or the last of as many as were counted."""

    def __init__(self, place: str, error: Callable[[], Exception]) -> None:
        self.holder, self.name, self.number = PLACES[place]
        self.error, self.calls, self.counted, self.armed = error, 0, 0, False
        self.original = getattr(self.holder, self.name)

    def __enter__(self) -> Fault:
        @functools.wraps(self.original)
        def failing(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.armed and self.calls - 1 == self.number % self.counted:
                raise self.error()
            return self.original(*arguments, **options)

        setattr(self.holder, self.name, failing)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self.holder, self.name, self.original)

    def arm(self) -> None:
        """Let it happen from now on."""
        self.armed, self.calls = True, 0


def make(host: str, **options: Any) -> tuple[nn.Module, Shampoo4]:
    model = hosts.wrap(hosts.make_model("mlp"), host)
    options = {**OPTIONS, **options}
    if options.get("method") == "soap":
        del options["root_interval"]
    return model, Shampoo4(hosts.named(model, host).items(), **options)


def advance(model: nn.Module, host: str, optimizer: Shampoo4, steps: range) -> None:
    for step in steps:
        hosts.set_gradients(model, host, hosts.make_gradients("mlp", step))
        optimizer.step()


def within_a_step(rank: int, host: str) -> dict[tuple[str, str], Any]:
    """Rank 1 fails in step 8, which has statistics and roots as step 4 has, in which calls are counted."""
    told: dict[tuple[str, str], Any] = {}
    for place, kind in CASES:
        if (host, place) == ("ddp", "packing"):
            continue  # it shares its batch as it is
        model, optimizer = make(host, **({"method": "soap"} if place.startswith("soap") else {}))
        advance(model, host, optimizer, range(3))
        with Fault(place, ERRORS[kind]) as fault:
            advance(model, host, optimizer, range(3, 4))
            fault.counted = fault.calls
            advance(model, host, optimizer, range(4, 7))
            before = hosts.full_parameters(model, host)
            if rank == 1:
                fault.arm()
            said = hosts.said(lambda: advance(model, host, optimizer, range(7, 8)))  # noqa: B023
        after = hosts.full_parameters(model, host)
        equal = all(torch.equal(after[name], before[name]) for name in before)
        then = hosts.said(lambda: advance(model, host, optimizer, range(8, 9)))  # noqa: B023
        told[place, kind] = said, equal, then
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_what_fails_on_one_rank_is_raised_on_all_before_any_parameter_has_changed(host: str) -> None:
    first, second = hosts.run_ranks(2, within_a_step, host)
    for place, kind in first:
        error = ERRORS[kind]()
        (there, equal_there, then_there), (here, equal_here, then_here) = first[place, kind], second[place, kind]
        assert here == f"{type(error).__name__}: {error}", (place, here)
        expected = "RuntimeError: rank 1: Peculiar: peculiar 1 2" if kind == "peculiar" else None
        assert there == (expected or f"{type(error).__name__}: {type(error)(f'rank 1: {error}')}"), (place, there)
        assert equal_there and equal_here, place
        assert then_there == then_here == "nothing was raised", (place, then_there, then_here)


# -- between steps, and when binding -----------------------------------------------------------------------------------


def fails(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def around_a_step(rank: int, host: str, folder: str) -> dict[str, Any]:
    """Rank 1 fails when the optimizer is bound, in its first base step, or between steps."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:

        def on_rank_1(holder: Any, name: str, replacement: Any = fails) -> None:
            if rank == 1:
                patch.setattr(holder, name, replacement)

        for case, holder, name in (
            ("factors", FactorPool, "__init__"),
            ("solvers", torch.linalg, "eigh"),
            ("replicas", distributor, "_digest"),
            ("base", torch.optim.AdamW, "step"),
            ("soap's own step", Updates, "step_along"),
            ("base beside soap", torch.optim.AdamW, "step"),
        ):
            if host != "ddp" and case == "replicas":
                continue
            model, optimizer = make(host, **({"method": "soap"} if "soap" in case else {}))
            before = hosts.full_parameters(model, host)
            on_rank_1(holder, name)
            told[case] = hosts.said(lambda: advance(model, host, optimizer, range(1)))  # noqa: B023
            after = hosts.full_parameters(model, host)
            matrices = [name for name in before if before[name].ndim > 1]  # with soap not the base's
            same = [name for name in before if torch.equal(after[name], before[name])]
            told[case, "unchanged"] = set(same) >= set(matrices if "beside" in case else before)
            patch.undo()
        model, optimizer = make(host)
        advance(model, host, optimizer, range(3))
        for case, holder, name, call in (
            ("consolidating", Preconditioner, "to_bytes", optimizer.consolidate_state_dict),
            ("health", FactorPool, "health", optimizer.health),
            ("saving", checkpoint.Path, "mkdir", lambda: checkpoint.save(optimizer, folder)),
            ("loading", checkpoint, "read_manifest", lambda: checkpoint.load(optimizer, folder)),
        ):
            on_rank_1(holder, name)
            told[case] = hosts.said(call)
            patch.undo()
            if case == "saving":
                checkpoint.save(optimizer, folder)
        told["then"] = hosts.said(lambda: advance(model, host, optimizer, range(3, 5)))
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_what_fails_on_one_rank_around_a_step_is_raised_on_all(host: str, tmp_path: Path) -> None:
    first, second = hosts.run_ranks(2, around_a_step, host, str(tmp_path))
    for case, there in first.items():
        if isinstance(case, tuple):
            assert (there and second[case]) or case[0] in ("base", "soap's own step"), case
        elif case != "then":
            assert second[case] == "OutOfMemoryError: CUDA out of memory", (case, second[case])
            assert there == "OutOfMemoryError: rank 1: CUDA out of memory", (case, there)
    assert first["then"] == second["then"] == "nothing was raised"


# -- outside of what the optimizer can see -----------------------------------------------------------------------------


def outside(rank: int) -> dict[str, Any]:
    """Rank 1 raises in a hook, a closure, or a base step that is not the first one: before or after the others meet."""
    told: dict[str, Any] = {}
    for case in ("hook", "global hook", "closure", "base", "first step's hook", "interrupt"):
        group = dist.new_group(timeout=PATIENCE)
        model = hosts.make_model("mlp")
        optimizer = Shampoo4(model.named_parameters(), **OPTIONS, process_group=group)
        if not case.startswith("first"):
            advance(model, "none", optimizer, range(3))
        hosts.set_gradients(model, "none", hosts.make_gradients("mlp", 3))

        def fail(*_: Any) -> Any:
            raise KeyboardInterrupt if case == "interrupt" else ArithmeticError("of the user's own")  # noqa: B023

        handle = None
        if rank == 1:
            if case in ("hook", "first step's hook", "interrupt"):
                handle = optimizer.register_step_pre_hook(fail)
            elif case == "global hook":
                handle = register_optimizer_step_pre_hook(fail)
            elif case == "base":
                optimizer.base.step = fail

        def steps() -> None:
            optimizer.step(fail if rank == 1 and case == "closure" else None)  # noqa: B023
            optimizer.step()  # noqa: B023

        begun = time.monotonic()
        try:
            told[case] = hosts.said(steps)
        except KeyboardInterrupt:
            told[case] = "KeyboardInterrupt"
        told[case, "seconds"] = time.monotonic() - begun
        if handle is not None:
            handle.remove()
        dist.barrier()
    return told


def test_ranks_that_wait_in_vain_say_why_the_other_one_has_left() -> None:
    first, second = hosts.run_ranks(2, outside)
    for case, there in first.items():
        if isinstance(case, tuple):
            assert there < PATIENCE.seconds + 3
            continue
        name = "KeyboardInterrupt" if case == "interrupt" else "ArithmeticError: of the user's own"
        assert second[case] == name
        assert there.startswith("RuntimeError: rank 0 has waited in vain for the other ranks of its group of 2"), there
        left = rf"Rank 1 left Shampoo4 (\d+) s ago with {name}"
        found = re.search(left, there)
        assert found and int(found[1]) <= PATIENCE.seconds + 3, (case, there)


# -- solvers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling cusolverDnSsyevd", True),
        ("linalg.eigh: the algorithm failed to converge", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling cusolverDnCreate(handle)", False),
        ("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("linalg.qr: not implemented for 'BFloat16'", False),
    ],
)
def test_solvers_that_raise_runtime_errors(message: str, number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """About one matrix's numbers: that matrix is NaN, the others are not; about anything else: it is raised."""
    whole: Callable[..., tuple[Tensor, Tensor]] = torch.linalg.eigh

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if (matrices[:, 0, 0] == 5).any():
            raise RuntimeError(message)
        return whole(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrices = torch.eye(8).repeat(3, 1, 1)
    matrices[1, 0, 0] = 5
    if not number:
        with pytest.raises(RuntimeError, match=message.replace("(", r"\(").replace(")", r"\)")):
            linalg.eigh(matrices)
        return
    values, vectors = linalg.eigh(matrices)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert values[[0, 2]].eq(1).all() and vectors[[0, 2]].isfinite().all()


def test_a_solver_without_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "geqrf", fails)
    with pytest.raises(torch.OutOfMemoryError):
        linalg.qr(torch.eye(8).repeat(3, 1, 1), torch.eye(8))
