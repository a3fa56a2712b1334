"""step() computes the same numbers whatever the caller has set around it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernels import CountWork
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.numerics import batches, quantization

SHAPES = [(96, 64), (64, 130), (128, 128), (40,), (256, 256)]
FAST = {"method": "shampoo", "lr": 1e-2, "statistics_interval": 2, "root_interval": 4, "min_quant_numel": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "float32 refreshes": {"refresh_dtype": "float32"},
    "compact": {"preset": "shampoo-compact"},
    "naive": {"quantize": "preconditioner"},
    "32 bits": {"bits": 32},
    "soap": {"method": "soap", "bits": 4, "momentum_dtype": "int8"},
}


@contextlib.contextmanager
def restored(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    former = get()
    put(value)
    try:
        yield
    finally:
        put(former)


def precision(value: str) -> contextlib.AbstractContextManager[None]:
    return restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


def default_dtype(value: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return restored(torch.get_default_dtype, torch.set_default_dtype, value)


def deterministic() -> contextlib.AbstractContextManager[None]:
    return restored(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "products in bfloat16": lambda: precision("medium"),
    "products in TF32": lambda: precision("high"),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "enabled gradients": torch.enable_grad,
}


def train(options: dict[str, Any], around: Callable[[], contextlib.AbstractContextManager[Any]]) -> list[Tensor]:
    """Weights and states after 9 steps; in every third one nothing surrounds the step, nor does it the constructor."""
    quantization._tables.cache_clear()
    batches._index_tensor.cache_clear()
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    options = {**FAST, **options}
    if options["method"] == "soap":
        del options["root_interval"]
    with around():
        optimizer = Shampoo4(parameters, **options)
    for step in range(9):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        with around() if step % 3 != 1 else contextlib.nullcontext():
            optimizer.step()
    states = [state[key] for state in optimizer.state_dict()["state"].values() for key in sorted(state)]
    return [*parameters, *states]


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("options", OPTIONS)
def test_surroundings_change_no_number(options: str, around: str) -> None:
    # In torch 2.9 and 2.10 AdamW itself counts its steps on the default device.
    used = {**OPTIONS[options], **({"base": "sgd"} if around == "default device" else {})}
    plain, found = train(used, contextlib.nullcontext), train(used, SURROUNDINGS[around])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(plain, found, strict=True))


def test_settings_come_back_after_the_step() -> None:
    with precision("medium"), torch.autocast("cpu", torch.bfloat16):
        train({}, contextlib.nullcontext)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_autocast_enabled("cpu")


def test_settings_come_back_after_a_step_that_fails() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo4([parameter], **FAST)
    parameter.grad = torch.zeros(8, 8).to_sparse()
    with precision("medium"), pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("around", ["autocast", "products in bfloat16", "default dtype bfloat16", "inference mode"])
def test_surroundings_of_a_load_change_no_number(around: str, tmp_path: Any) -> None:
    def resumed(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(64, 96)
        optimizer = Shampoo4(model.named_parameters(), **FAST)
        with context():
            checkpoint.load(optimizer, tmp_path)
            optimizer.health()
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        return list(model.parameters())

    model = nn.Linear(64, 96)
    optimizer = Shampoo4(model.named_parameters(), **FAST)
    for _ in range(5):
        model(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
    checkpoint.save(optimizer, tmp_path)
    plain, found = resumed(contextlib.nullcontext), resumed(SURROUNDINGS[around])
    assert all(map(torch.equal, plain, found))


class Precisions(TorchDispatchMode):
    """Counts products and factorizations by the precision in which CUDA would multiply float32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("bmm", "baddbmm", "mm", "linalg_cholesky_ex", "linalg_solve_triangular"):
            self.found[torch.backends.cuda.matmul.fp32_precision] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", ["nothing", "products in TF32"])
@pytest.mark.parametrize("method", ["shampoo", "soap"])
def test_only_the_products_that_make_a_direction_are_in_tf32(method: str, around: str) -> None:
    """On the meta device, which takes the branches of CUDA: four steps, the last with refreshes, and one more."""
    root_interval = {"root_interval": 4} if method == "shampoo" else {}
    for matmul_dtype in ("float32", "tf32"):
        parameter = nn.Parameter(torch.empty(64, 96, device="meta"))
        options: dict[str, Any] = {"statistics_interval": 4, "matmul_dtype": matmul_dtype, **root_interval}
        optimizer = Shampoo4([parameter], method=method, **options)
        with SURROUNDINGS.get(around, contextlib.nullcontext)():
            former, counts = torch.backends.cuda.matmul.fp32_precision, []
            for step in range(1, 6):
                parameter.grad = torch.empty_like(parameter)
                with CountWork(answer=step == 1), Precisions() as precisions:
                    optimizer.step()
                counts.append(precisions.found)
            assert torch.backends.cuda.matmul.fp32_precision == former
        refresh, ordinary = counts[3:]
        products = 4 if method == "soap" else 2  # of a direction
        assert refresh["ieee"] > 40 and set(refresh | ordinary) <= {"ieee", "tf32"}
        if matmul_dtype == "tf32":
            assert ordinary == {"tf32": products} and refresh["tf32"] == products
        else:
            assert ordinary == {"ieee": products} and not refresh["tf32"]


def test_tf32_is_refused_on_a_cpu() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"matmul_dtype='tf32' is for CUDA devices, but blocks\.weight is .* cpu"):
        Shampoo4([("blocks.weight", weight)], matmul_dtype="tf32").step()
    assert torch.equal(weight, torch.ones(8, 8))


@pytest.mark.parametrize("whole", [False, True], ids=["step", "training step"])
def test_a_compiler_around_the_step_leaves_it_alone(whole: bool) -> None:
    def run(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(64, 96)
        optimizer = Shampoo4(model.named_parameters(), **FAST)

        def one(images: Tensor) -> None:
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()

        training = torch.compile(one, backend="eager") if compiled and whole else one
        if compiled and not whole:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        for _ in range(9):
            training(torch.randn(4, 64))
        return list(model.parameters())

    torch._dynamo.utils.counters.clear()
    assert all(map(torch.equal, run(False), run(True)))
    assert torch._dynamo.utils.counters["frames"]["total"] < 20


def test_hooks_of_all_optimizers_run_once_a_step() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo4([parameter], **FAST)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda found, *_: calls.append(f"before {type(found).__name__}")),
        register_optimizer_step_post_hook(lambda found, *_: calls.append(f"after {type(found).__name__}")),
    ]
    try:
        parameter.grad = torch.ones(8, 8)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["before Shampoo4", "after Shampoo4"]
