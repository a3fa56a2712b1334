"""Low-bit optimizers as the base: torchao's, whose states are tensor subclasses, and bitsandbytes' codes and maps."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import worlds as hosts
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint, estimate_memory
from sharded_shampoo4.integrations import fsdp
from sharded_shampoo4.tensors import floats, is_low_bit

BASES = {
    "torchao 8 bits": ("torchao", "AdamW8bit"),
    "torchao 4 bits": ("torchao", "AdamW4bit"),
    "bitsandbytes": ("bitsandbytes", "AdamW8bit"),
}
AO = ("torchao 8 bits", "torchao 4 bits")
OPTIONS: dict[str, Any] = {
    "method": "shampoo",
    "statistics_interval": 2,
    "root_interval": 4,
    "lr": 1e-2,
    "weight_decay": 0.01,
}
MISSING = [package for package in ("torchao", "bitsandbytes") if importlib.util.find_spec(package) is None]


def each(*names: str) -> pytest.MarkDecorator:
    """The test once for each base, skipped where its package is missing."""
    marked = [
        pytest.param(name, marks=pytest.mark.skipif(BASES[name][0] in MISSING, reason=f"needs {BASES[name][0]}"))
        for name in names
    ]
    return pytest.mark.parametrize("name", marked)


def base_class(name: str) -> Any:
    package, rule = BASES[name]
    return getattr(importlib.import_module(f"{package}.optim"), rule)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Without torch.compile, which torchao's steps use: it would take minutes here."""
    with torch.compiler.set_stance("force_eager"), hosts.one_thread():
        yield


class Net(nn.Module):
    """Weights of 8192 elements, of 8320 (65 x 128: no multiple of 256), and some below 4096."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.odd, self.head = nn.Linear(64, 128), nn.Linear(128, 65), nn.Linear(65, 9)
        self.units = [self.odd]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.odd(torch.tanh(self.stem(x)))))


SIZES = [8192, 128, 8320, 65, 585, 9]


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def make_gradients(step: int) -> dict[str, Tensor | None]:
    """Few multiples of 1/8, so that means over equal replicas are exact; not centred, so that moments persist."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (8 * torch.randn(parameter.shape, generator=generator) + 3).round() / 64
        for name, parameter in make_net().named_parameters()
    }


def replay(net: nn.Module, optimizer: Shampoo4, steps: range, host: str = "none") -> dict[str, Tensor]:
    for step in steps:
        gradients = {name: g.to(net_dtype(net)) for name, g in make_gradients(step).items() if g is not None}
        hosts.set_gradients(net, host, gradients)
        optimizer.step()
    return hosts.full_parameters(net, host)


def net_dtype(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, Shampoo4]:
    net = make_net(seed, dtype)
    return net, Shampoo4(net.named_parameters(), base=base_class(name), **{**OPTIONS, **options})


def floats_of(optimizer: Shampoo4, key: str) -> list[Tensor]:
    return [floats(state[key]) for state in optimizer.state.values()]


# -- one process -------------------------------------------------------------------------------------------------------


@functools.cache
def losses(base: Any) -> list[float]:
    """Of learning what another net computes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 64, generator=generator)
    with torch.no_grad():
        targets = 2 * make_net(7)(inputs)
    net = make_net()
    rule = {"method": "shampoo", "statistics_interval": 5, "root_interval": 5}
    optimizer = Shampoo4(net.named_parameters(), base=base, lr=3e-3, **rule)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    found = []
    for _ in range(50):
        optimizer.zero_grad()
        found.append(hosts.train_step(net, (inputs, targets)))
        optimizer.step()
        schedule.step()
    assert isinstance(optimizer.param_groups[0]["lr"], float)  # also where the base wants a tensor
    return found


@each(*BASES)
def test_it_learns_as_with_adamw(name: str) -> None:
    expected, found = losses("adamw"), losses(base_class(name))
    print(f"{name}: {found[0]:.4f} to {found[-1]:.5f}, with AdamW to {expected[-1]:.5f}")
    assert found[0] == expected[0] > 20 * expected[-1]
    assert found[-1] < (1.7 if "4" in name else 1.05) * expected[-1]


@each(*BASES)
def test_without_preconditioning_it_is_the_base_itself(name: str) -> None:
    """A learning rate that the program sets reaches the base, as a tensor where it wants one."""
    net, optimizer = make(name, precondition=False)
    other = make_net()
    plain = base_class(name)(other.parameters(), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    for step, lr in enumerate((1e-2, 3e-3, 1e-3)):
        plain.param_groups[0]["lr"] = torch.tensor(lr) if "torchao" in name else lr
        gradients = make_gradients(step)
        for key, parameter in other.named_parameters():
            parameter.grad = gradients[key]
        plain.step()
        optimizer.param_groups[0]["lr"] = lr
        found = replay(net, optimizer, range(step, step + 1))
    assert all(torch.equal(parameter, found[key]) for key, parameter in other.named_parameters())


def expected_bytes(name: str, sizes: list[int]) -> int:
    """By the packages' rules: codes, scales, maps, step counts; float32 for what is small or no multiple of a block."""
    if name == "bitsandbytes":  # the maps are shared, the last block may be short, steps are plain numbers
        low = [size for size in sizes if size >= 4096]
        return sum(2 * (n + 4 * -(-n // 256)) if n in low else 8 * n for n in sizes) + (2048 if low else 0)
    bits, block, maps = (8, 256, 1024) if "8" in name else (4, 128, 64)
    low = [size for size in sizes if size >= 4096 and size % block == 0]
    return sum(4 + (2 * (n * bits // 8 + 4 * n // block + maps) if n in low else 8 * n) for n in sizes)


@each(*BASES)
def test_bytes_are_those_that_are_kept(name: str) -> None:
    net, optimizer = make(name)
    replay(net, optimizer, range(2))
    assert optimizer.state_bytes()["base"] == expected_bytes(name, SIZES)
    shapes = {key: parameter.shape for key, parameter in net.named_parameters()}
    estimate = estimate_memory(shapes, base=base_class(name), host="none", method="shampoo")
    assert estimate.base == [optimizer.state_bytes()["base"]]
    assert estimate.preconditioner == [optimizer.state_bytes()["preconditioner"]]
    for rows, columns in ((64, 64), (63, 65)):  # one that is quantised, alone, and one that is just too small
        alone = estimate_memory({"only": (rows, columns)}, base=base_class(name), method="shampoo")
        assert alone.base == [expected_bytes(name, [rows * columns])]


@each(*AO)
def test_options_of_the_base_shape_its_bytes(name: str) -> None:
    net, optimizer = make(name, block_size=64)
    replay(net, optimizer, range(1))
    shapes = {key: parameter.shape for key, parameter in net.named_parameters()}
    estimate = estimate_memory(shapes, base=base_class(name), block_size=64, method="shampoo")
    assert estimate.base == [optimizer.state_bytes()["base"]] != [expected_bytes(name, SIZES)]


@each("torchao 4 bits")
def test_a_whole_vit_b_takes_less_than_2_3_bytes_a_parameter(name: str) -> None:
    """All states together, measured: compact factors and 4-bit moments. 8-bit AdamW alone takes 2.05."""
    layer = {"query": (768, 768), "key": (768, 768), "value": (768, 768), "out": (768, 768)}
    layer |= {"fc1": (3072, 768), "fc2": (768, 3072), "bias": (3072,), "norm": (768,)}
    shapes = {f"{number}.{kind}": shape for number in range(12) for kind, shape in layer.items()}
    shapes |= {"patches": (768, 3, 16, 16), "positions": (1, 197, 768), "head": (1000, 768)}
    parameters = {key: nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
    optimizer = Shampoo4(parameters.items(), base=base_class(name), preset="shampoo-compact")
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    kept = optimizer.state_bytes()
    elements = sum(parameter.numel() for parameter in parameters.values())
    assert kept["preconditioner"] <= 1.15 * elements and sum(kept.values()) <= 2.3 * elements
    estimate = estimate_memory(shapes, host="none", base=base_class(name), preset="shampoo-compact")
    assert estimate.total == [sum(kept.values())]
    print({key: round(size / elements, 3) for key, size in kept.items()})


def test_estimates_of_bases_that_cannot_step_without_memory() -> None:
    shapes = {"weight": (100, 50), "bias": (7,)}
    assert estimate_memory(shapes, fused=True) == estimate_memory(shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each(*BASES)
def test_a_state_dict_continues_bitwise(name: str, dtype: torch.dtype) -> None:
    net, optimizer = make(name, dtype=dtype)
    replay(net, optimizer, range(5))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    size = optimizer.state_bytes()["base"]
    expected = replay(net, optimizer, range(5, 9))

    other_net, other = make(name, seed=1, dtype=dtype)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other_net.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.state_bytes()["base"] == size
    end = replay(other_net, other, range(5, 9))
    assert all(torch.equal(end[key], expected[key]) for key in expected)


@each(*BASES)
def test_a_copy_continues_bitwise(name: str) -> None:
    """By pickle: torchao's states cannot be deep-copied."""
    net, optimizer = make(name)
    replay(net, optimizer, range(5))
    other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 3e-3
    expected = replay(net, optimizer, range(5, 9))
    end = replay(other_net, other, range(5, 9))
    assert all(torch.equal(end[key], expected[key]) for key in expected)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Up to a part of the way that the weights have gone."""
    start = {key: parameter.detach() for key, parameter in make_net().named_parameters()}
    for key, wanted in expected.items():
        part = float(torch.dist(found[key], wanted) / torch.dist(wanted, start[key]))
        assert part <= tolerance, (key, part)


# -- portable checkpoints ----------------------------------------------------------------------------------------------

# Of first moments, in the Euclidean norm: what one more rounding changes at most. It changes nothing where each block's
# largest value is positive: the codebook holds 1 and not -1.
ROUNDING = {"torchao 8 bits": 0.01, "torchao 4 bits": 0.12}


def assert_same_states(name: str, found: Shampoo4, expected: Shampoo4) -> None:
    """Second moments bitwise, and first ones that are kept in float32; others up to one rounding."""
    for left, right in zip(found.state.values(), expected.state.values(), strict=True):
        assert left["step"] == right["step"]
        assert is_low_bit(left["exp_avg"]) == is_low_bit(right["exp_avg"])
        assert torch.equal(floats(left["exp_avg_sq"]), floats(right["exp_avg_sq"]))
        first, wanted = floats(left["exp_avg"]), floats(right["exp_avg"])
        if is_low_bit(left["exp_avg"]):
            assert torch.dist(first, wanted) < ROUNDING[name] * wanted.norm()
        else:
            assert torch.equal(first, wanted)


@each(*AO)
def test_a_portable_checkpoint_loads_up_to_one_rounding(name: str, tmp_path: Path) -> None:
    net, optimizer = make(name)
    start = replay(net, optimizer, range(5))
    checkpoint.save(optimizer, tmp_path)
    other_net, other = make(name, seed=1)
    checkpoint.load(other, tmp_path)
    assert all(torch.equal(parameter, start[key]) for key, parameter in other_net.named_parameters())
    assert_same_states(name, other, optimizer)
    assert other.state_bytes() == optimizer.state_bytes()
    assert_close(replay(other_net, other, range(5, 9)), replay(net, optimizer, range(5, 9)), ROUNDING[name])


@each("bitsandbytes")
def test_codes_are_no_portable_checkpoint(name: str, tmp_path: Path) -> None:
    net, optimizer = make(name)
    replay(net, optimizer, range(2))
    message = r"base=AdamW8bit of bitsandbytes\.\S+ keeps state1 of stem\.weight \(torch\.uint8, .* Save .*state_dict"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(optimizer, tmp_path)
    assert not (tmp_path / checkpoint.MANIFEST).exists()


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
def test_bases_of_the_same_name_do_not_load_each_others(tmp_path: Path) -> None:
    net, optimizer = make("torchao 8 bits")
    replay(net, optimizer, range(2))
    checkpoint.save(optimizer, tmp_path)
    net, other = make("bitsandbytes")
    before = replay(net, other, range(2))
    with pytest.raises(ValueError, match=r"AdamW8bit of bitsandbytes\.\S+ keeps state1 of stem.weight"):
        checkpoint.load(other, tmp_path)
    assert all(torch.equal(parameter, before[key]) for key, parameter in net.named_parameters())


# -- ranks -------------------------------------------------------------------------------------------------------------

DTENSOR_HOSTS = ("fsdp2", "hsdp")


def wrapped(name: str, host: str, seed: int = 0) -> tuple[nn.Module, Shampoo4]:
    net = hosts.wrap(make_net(seed), host)
    optimizer = Shampoo4(hosts.named(net, host).items(), base=base_class(name), **OPTIONS)
    if host == "fsdp1":
        fsdp.bind(optimizer, net)
    return net, optimizer


def of_torchao(name: str, host: str, folder: Path) -> dict[str, Any]:
    """Nine steps, of which the last four from a state_dict where that is sharded; and four after loading."""
    net, optimizer = wrapped(name, host)
    replay(net, optimizer, range(5), host)
    checkpoint.save(optimizer, folder / name / host)
    size = optimizer.state_bytes()["base"]
    if host in DTENSOR_HOSTS:
        weights, state = net.state_dict(), optimizer.state_dict()
        net, optimizer = wrapped(name, host, seed=1)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    end = replay(net, optimizer, range(5, 9), host)
    net, optimizer = wrapped(name, host, seed=1)
    checkpoint.load(optimizer, folder / name / "none")
    resized = optimizer.state_bytes()["base"]
    return {"end": end, "bytes": size, "resumed": replay(net, optimizer, range(5, 9), host), "resumed bytes": resized}


def of_bitsandbytes(name: str, host: str, folder: Path) -> dict[str, Any]:
    net, optimizer = wrapped(name, host)
    if host in DTENSOR_HOSTS:
        return {"refused": hosts.said(lambda: replay(net, optimizer, range(1), host))}
    end = replay(net, optimizer, range(9), host)
    refused = hosts.said(lambda: checkpoint.save(optimizer, folder / name / host))
    return {"end": end, "bytes": optimizer.state_bytes()["base"], "refused": refused}


def on_a_rank(rank: int, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    with torch.compiler.set_stance("force_eager"):
        return {
            (name, host): (of_torchao if package == "torchao" else of_bitsandbytes)(name, host, folder)
            for name, (package, _) in BASES.items()
            for host in hosts.HOSTS
            if package not in MISSING
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one process after five steps; those of the ranks come beside them."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.compiler.set_stance("force_eager"), hosts.one_thread():
        for name in AO if "torchao" not in MISSING else ():
            net, optimizer = make(name)
            replay(net, optimizer, range(5))
            checkpoint.save(optimizer, folder / name / "none")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return hosts.run_ranks(2, on_a_rank, folder)


@functools.cache
def by_one_process(name: str) -> dict[str, Tensor]:
    return replay(*make(name), range(9))


def same_blocks(name: str, host: str) -> bool:
    """Whether the shards of two ranks begin and end with blocks, and none of them is too small to be quantised."""
    return host == "ddp" or (name == "torchao 4 bits" and host in DTENSOR_HOSTS)


def tolerance_of(name: str) -> float:
    return 0.25 if "4" in name else 0.02


@pytest.mark.parametrize("host", hosts.HOSTS)
@each(*AO)
def test_ranks_train_what_one_process_does_up_to_rounding(name: str, host: str, ranks: Any) -> None:
    """Bitwise where blocks are the same; elsewhere they are others, and small shards are not quantised at all."""
    expected = by_one_process(name)
    for rank in ranks:
        found = rank[name, host]
        assert_close(found["end"], expected, 0.0 if same_blocks(name, host) else tolerance_of(name))
        assert_close(found["resumed"], expected, tolerance_of(name))
        assert found["resumed bytes"] == found["bytes"]


@pytest.mark.parametrize("host", hosts.HOSTS)
@each("bitsandbytes")
def test_bitsandbytes_on_ranks(name: str, host: str, ranks: Any) -> None:
    for rank in ranks:
        found = rank[name, host]
        if host in DTENSOR_HOSTS:
            assert "base=AdamW8bit of bitsandbytes.optim.adamw cannot step on the DTensors" in found["refused"]
            assert found["refused"].startswith("TypeError")
        else:
            assert_close(found["end"], by_one_process(name), 0.0 if host == "ddp" else tolerance_of(name))
            assert "keeps state1 of stem.weight" in found["refused"]


@pytest.mark.parametrize("host", ["ddp", "fsdp2", "hsdp"])
@each(*AO)
def test_ranks_keep_what_was_estimated(name: str, host: str, ranks: Any) -> None:
    shapes = {key: parameter.shape for key, parameter in make_net().named_parameters()}
    replicas = 1 if host == "hsdp" else None
    estimate = estimate_memory(shapes, 2, host=host, replicas=replicas, base=base_class(name), method="shampoo")
    assert [rank[name, host]["bytes"] for rank in ranks] == estimate.base


@pytest.mark.parametrize("host", hosts.HOSTS)
@each(*AO)
def test_one_process_goes_on_where_ranks_have_stopped(name: str, host: str, ranks: Any, folder: Path) -> None:
    net, optimizer = make(name, seed=1)
    checkpoint.load(optimizer, folder / name / host)
    assert optimizer.state_bytes()["base"] == expected_bytes(name, SIZES)
    assert_close(replay(net, optimizer, range(5, 9)), by_one_process(name), tolerance_of(name))
