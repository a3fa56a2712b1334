"""The portable checkpoint: saved under any host, loaded under any other on any number of ranks; and what is refused."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import make_optimizer
from support.training import ALL, FIRST, KIND, OPTIONS, THEN, Training
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.checkpoint.files import write_manifest
from sharded_shampoo4.members import Members
from sharded_shampoo4.options import PreconditionerOptions

METHODS: dict[str, dict[str, Any]] = {
    "shampoo": {},
    "soap": {"method": "soap", "bits": 4, "refresh": "staggered", "second_moment_dtype": "int8"},
}


def save_all(rank: int, folder: str) -> None:
    zero.prepare()
    for method, options in METHODS.items():
        for host in ALL:
            training = Training(host, kind="vit", **options)
            training.train(FIRST)
            training.save(f"{folder}/{method}/{host}")
            training.end()


def load_all(rank: int, folder: str, method: str) -> dict[tuple[str, str], Any]:
    zero.prepare()
    found = {}
    for source in (*ALL, "none"):
        for host in ALL:
            training = Training(host, seed=1, kind="vit", **METHODS[method])
            training.load(f"{folder}/{method}/{source}")
            loaded = training.parameters()
            found[source, host] = loaded, training.train(THEN), training.optimizer.state_bytes()
            training.end()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each host on two ranks, and of one process."""
    folder = tmp_path_factory.mktemp("saved")
    hosts.run_ranks(2, save_all, str(folder))
    with hosts.one_thread():
        for method, options in METHODS.items():
            training = Training("none", kind="vit", **options)
            training.train(FIRST)
            training.save(folder / method / "none")
    return folder


@functools.cache
def expected(method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights at the checkpoint, and at the end of a run without a stop."""
    with hosts.one_thread():
        training = Training("none", kind="vit", **METHODS[method])
        return training.train(FIRST), training.train(THEN)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "world_size"), [("shampoo", 2), ("soap", 3)])
def test_every_checkpoint_continues_everywhere_bitwise(saved: Path, method: str, world_size: int) -> None:
    at_save, at_end = expected(method)
    results = hosts.run_ranks(world_size, load_all, str(saved), method)
    assert len(results[0]) == 72
    for rank in results:
        for pair, (loaded, end, _) in rank.items():
            for name in at_save:
                assert torch.equal(loaded[name], at_save[name]), (pair, name)
                assert torch.equal(end[name], at_end[name]), (pair, name)


@pytest.mark.parametrize("method", METHODS)
def test_one_process_continues_what_many_have_saved(saved: Path, method: str) -> None:
    with hosts.one_thread():
        for source in ALL:
            training = Training("none", seed=1, kind="vit", **METHODS[method])
            training.load(saved / method / source)
            end = training.train(THEN)
            assert all(torch.equal(end[name], expected(method)[1][name]) for name in end), source


def pass_on(rank: int, folder: str, method: str) -> dict[str, Tensor]:
    """One run that each host takes over from the one before, after every two steps."""
    zero.prepare()
    for number, host in enumerate(("fsdp1", "fsdp1", "zero3", "fsdp1", "hsdp", "zero1", "fsdp1", "ddp")):
        training = Training(host, seed=number, kind="vit", **METHODS[method])
        if number:
            training.load(folder)
        end = training.train(range(2 * number, 2 * number + 2))
        training.save(folder)
        training.end()
    return end


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_passed_from_host_to_host(method: str, tmp_path: Path) -> None:
    """Ranks that hold nothing of a parameter must not bring in counts of their own."""
    with hosts.one_thread():
        expected = Training("none", kind="vit", **METHODS[method]).train(range(16))
    for end in hosts.run_ranks(3, pass_on, str(tmp_path), method):
        assert all(torch.equal(end[name], expected[name]) for name in expected)


def save_and_load_after_evaluations(rank: int, folder: str) -> list[bool]:
    inputs, _ = hosts.make_batch(KIND)
    same = []
    for host in ("fsdp2", "hsdp", "fsdp1"):
        outputs = []
        for seed in (0, 1):
            training = Training(host, seed)
            with torch.no_grad():
                training.model(inputs)  # leaves FSDP2's root with whole weights
            if seed:
                training.load(f"{folder}/{host}")
            else:
                training.train(FIRST)
                with torch.no_grad():
                    training.model(inputs)
                training.save(f"{folder}/{host}")
            with torch.no_grad():
                outputs.append(training.model(inputs))
        same.append(torch.equal(*outputs))
    return same


def test_saving_and_loading_after_an_evaluation(tmp_path: Path) -> None:
    """Whole weights that are left from it are neither frozen ones, nor used again after loading."""
    assert hosts.run_ranks(2, save_and_load_after_evaluations, str(tmp_path)) == [[True] * 3] * 2


# -- mismatches and damage ---------------------------------------------------------------------------------------------


def trained(folder: Path, **options: Any) -> Shampoo4:
    """A small optimizer after some steps, saved in ``folder``."""
    optimizer = Training("none", **options)
    optimizer.train(FIRST)
    checkpoint.save(optimizer.optimizer, folder)
    return optimizer.optimizer


def snapshot(optimizer: Shampoo4) -> list[bytes]:
    """Everything that a failed load must leave as it is."""
    state = optimizer.state_dict()
    tensors = [value for entry in state["state"].values() for value in entry.values() if isinstance(value, Tensor)]
    tensors += [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 8}, r"bits=4 where this optimizer has bits=8"),
    "code book": ({"codebook": "dynamic_tree"}, r"codebook='linear2' where .* codebook='dynamic_tree'"),
    "scales": ({"quant_block_size": 32}, r"quant_block_size=64 where .* quant_block_size=32"),
    "block size": ({"max_preconditioner_dim": 40}, r"max_preconditioner_dim=30 where .* max_preconditioner_dim=40"),
    "split": ({"split": "remainder"}, r"split='aligned' where .* split='remainder'"),
    "what is quantized": ({"quantize": "preconditioner"}, r"quantize='eigenbasis' where .* quantize='preconditioner'"),
    "threshold": ({"min_quant_numel": 600}, r"min_quant_numel=0 where .* min_quant_numel=600"),
    "roots": ({"root": "implicit"}, r"root='stored' where .* root='implicit'"),
    "types of scales": ({"scale_dtype": "bfloat16"}, r"scale_dtype='float32' where .* scale_dtype='bfloat16'"),
    "base": ({"base": "sgd", "momentum": 0.9}, r"base optimizer AdamW, this one has SGD"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_options_that_shape_bytes_must_agree(name: str, tmp_path: Path) -> None:
    options, message = MISMATCHES[name]
    trained(tmp_path)
    other = Training("none", **options)
    other.train(FIRST)
    before = snapshot(other.optimizer)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(other.optimizer, tmp_path)
    assert snapshot(other.optimizer) == before


def test_a_checkpoint_with_roots_that_are_no_longer_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = PreconditionerOptions.shaping_bytes
    with monkeypatch.context() as patch:
        patch.setattr(PreconditionerOptions, "shaping_bytes", lambda options: {**now(options), "root": "triangle"})
        trained(tmp_path)
    other = Training("none")
    with pytest.raises(ValueError, match="got 'triangle', which is no longer there, nor are its states read"):
        checkpoint.load(other.optimizer, tmp_path)


def test_names_and_shapes_must_agree(tmp_path: Path) -> None:
    trained(tmp_path)
    renamed = [("body" + name.removeprefix("stem"), p) for name, p in hosts.make_model(KIND).named_parameters()]
    with pytest.raises(ValueError, match="the checkpoint has no body"):
        checkpoint.load(Shampoo4(renamed, **OPTIONS), tmp_path)
    fewer = list(hosts.make_model(KIND).named_parameters())[:-1]
    with pytest.raises(ValueError, match=r"there is no head\.bias here"):
        checkpoint.load(Shampoo4(fewer, **OPTIONS), tmp_path)
    other = [(name, nn.Parameter(p.detach()[:7])) for name, p in hosts.make_model(KIND).named_parameters()]
    with pytest.raises(ValueError, match=r"stem.weight has shape \[44, 20\] in the checkpoint and \[7, 20\] here"):
        checkpoint.load(Shampoo4(other, **OPTIONS), tmp_path)
    with pytest.raises(ValueError, match="needs names, but parameter 0 of group 0"):
        checkpoint.save(Shampoo4(hosts.make_model(KIND).parameters()), tmp_path)
    with pytest.raises(TypeError, match="Shampoo4"):
        checkpoint.save(torch.optim.SGD(hosts.make_model(KIND).parameters()), tmp_path)


def test_missing_truncated_and_newer_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load(Training("none").optimizer, tmp_path)
    optimizer = trained(tmp_path)
    before = snapshot(optimizer)
    (data,) = tmp_path.glob("data-*")
    for path in sorted(data.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ValueError, match=f"{path.name} has {len(whole) // 2} bytes where {len(whole)} were written"
        ):
            checkpoint.load(optimizer, tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name} is missing"):
            checkpoint.load(optimizer, tmp_path)
        path.write_bytes(whole)
    write_manifest(tmp_path, {**checkpoint.read_manifest(tmp_path), "format": 99})
    with pytest.raises(ValueError, match="has format 99, this version reads up to 2"):
        checkpoint.load(optimizer, tmp_path)
    assert snapshot(optimizer) == before


def test_flipped_bits_never_load_as_numbers(tmp_path: Path) -> None:
    """Sixty bits each of all files, one at a time."""
    optimizer = trained(tmp_path)
    before = snapshot(optimizer)
    generator = torch.Generator().manual_seed(0)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        for _ in range(60):
            place, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(whole), 8))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises((ValueError, FileNotFoundError)):
                checkpoint.load(optimizer, tmp_path)
        path.write_bytes(whole)
    assert snapshot(optimizer) == before
    checkpoint.load(optimizer, tmp_path)


def test_parameters_are_listed_once_for_a_save_and_once_for_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training("none")
    training.train(FIRST)
    listed = []
    calls = Members.calls
    monkeypatch.setattr(Members, "calls", lambda self, groups: listed.append(1) or calls(self, groups))
    checkpoint.save(training.optimizer, tmp_path, model=training.model)
    assert len(listed) == 1
    checkpoint.load(training.optimizer, tmp_path, model=training.model)
    assert len(listed) == 2


def test_a_new_save_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    training = Training("none")
    for steps in (range(2), range(2, 4), range(4, 6)):
        expected = training.train(steps)
        training.save(tmp_path)
    (tmp_path / "data-unfinished").mkdir()
    other = Training("none", seed=1)
    with pytest.warns(UserWarning, match="data-unfinished of a save that was cut off: passed over"):
        other.load(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in other.parameters().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.save(tmp_path)
        other.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_that_are_not_contiguous(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, Shampoo4]:
        torch.manual_seed(seed)
        layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
        return layer, Shampoo4(layer.named_parameters(), statistics_interval=1)

    def step(layer: nn.Module, optimizer: Shampoo4) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter).cumsum(0)
        optimizer.step()

    (first, optimizer), (second, other) = make(0), make(1)
    step(first, optimizer)
    checkpoint.save(optimizer, tmp_path)
    checkpoint.load(other, tmp_path)
    for _ in range(2):
        assert torch.equal(first.weight, second.weight) and not first.weight.is_contiguous()
        step(first, optimizer)
        step(second, other)


def test_frozen_parameters_and_buffers_need_the_model(tmp_path: Path) -> None:
    training = Training("none", kind="vit")
    training.train(FIRST)
    checkpoint.save(training.optimizer, tmp_path)
    other = Training("none", seed=1, kind="vit")
    with pytest.raises(ValueError, match=r"no frozen parameter or buffer frozen\.bias, .* saved without model=\?"):
        other.load(tmp_path)
    training.save(tmp_path)
    before = other.parameters()
    with pytest.warns(UserWarning, match=r"\(unused.weight|frozen.*\) are left as they are: give model="):
        checkpoint.load(other.optimizer, tmp_path)
    after, expected = other.parameters(), training.parameters()
    for name in after:
        of = before if name == "seen" or name.startswith(("frozen", "unused")) else expected
        assert torch.equal(after[name], of[name]), name
    other.model.seen = torch.zeros(3)
    with pytest.raises(ValueError, match=r"seen \(not trained\) has shape \[2\] in the checkpoint and \[3\] here"):
        other.load(tmp_path)


# -- what an engine of DeepSpeed keeps ---------------------------------------------------------------------------------


def save_progress(rank: int, folder: str) -> list[Any]:
    """An engine's counters, loss scale and scheduler, before and after, and what is warned of elsewhere."""
    zero.prepare()
    zero.pretend_fp16()
    found: list[Any] = []
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}}
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 1}

    def engine(host: str) -> Any:
        model = hosts.make_model(KIND)
        optimizer = make_optimizer(model, "none", OPTIONS)
        configuration = zero.configuration(host, fp16=fp16, scheduler=scheduler)
        return zero.start(zero.Replay(model), configuration, optimizer)

    for host, then in (("zero2", "zero3"), ("zero1", "zero0")):
        first = engine(host)
        for step in FIRST:
            gradients = hosts.make_gradients(KIND, step)
            if step == 1:
                gradients["head.bias"] = torch.full((10,), float("inf"))  # skipped, and the scale is halved
            zero.step(first, gradients)
        checkpoint.save(first, f"{folder}/{host}")
        second = engine(then)
        checkpoint.load(second, f"{folder}/{host}")
        found.append([(e.global_steps, e.skipped_steps, e.optimizer.loss_scale, e.get_lr()) for e in (first, second)])
        second.destroy()
        first.destroy()
    training = Training("ddp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.load(training.optimizer, f"{folder}/zero2")
        found.append([str(warning.message) for warning in caught if "scheduler" in str(warning.message)])
    return found


def test_an_engines_progress_moves(tmp_path: Path) -> None:
    for *engines, warned in hosts.run_ranks(2, save_progress, str(tmp_path)):
        for before, after in engines:
            assert before == after
            assert before[:2] == (5, 1) and before[2] != 16.0
        assert len(warned) == 1 and "DeepSpeed's scheduler, which is not used here" in warned[0]
