"""Rows, columns and blocks without gradients stay where the base alone leaves them; numbers are rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.directions import Directions
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint, state_dict

FAST: dict[str, Any] = {"method": "shampoo", "statistics_interval": 3, "root_interval": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "8 bits": {"bits": 8},
    "3 bits": {"bits": 3},
    "32 bits": {"bits": 32},
    "32 bits, float32 refreshes": {"bits": 32, "refresh_dtype": "float32"},
    "float32 refreshes": {"refresh_dtype": "float32"},
    "naive": {"quantize": "preconditioner"},
    "naive, float32 refreshes": {"quantize": "preconditioner", "refresh_dtype": "float32"},
    "dynamic tree": {"codebook": "dynamic_tree"},
    "normal": {"codebook": "normal"},
    "compact": {"preset": "shampoo-compact"},
    "compact, 3 bits": {"preset": "shampoo-compact", "bits": 3},
    "compact, 8 bits": {"preset": "shampoo-compact", "bits": 8},
    "implicit roots": {"root": "implicit"},
    "rectified roots": {"root": "rectified"},
    "staggered": {"refresh": "staggered"},
    "blocks": {"max_preconditioner_dim": 100},
    "block grafting": {"grafting": "block", "max_preconditioner_dim": 100},
    "bfloat16 products and exchange": {"matmul_dtype": "bfloat16", "exchange_dtype": "bfloat16"},
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
SOAP: dict[str, dict[str, Any]] = {
    "default": {},
    "4 bits": {"bits": 4},
    "4 bits, normal": {"bits": 4, "codebook": "normal"},
    "3 bits": {"bits": 3, "rectify_steps": (1, 2)},
    "32 bits": {"bits": 32, "momentum_dtype": "float32", "second_moment_dtype": "float32"},
    "8-bit moments": {"momentum_dtype": "int8", "second_moment_dtype": "int8"},
    "4 bits, 8-bit moments": {"bits": 4, "momentum_dtype": "int8", "second_moment_dtype": "int8"},
    "float64 refreshes, staggered": {"refresh_dtype": "float64", "refresh": "staggered"},
    "blocks": {"max_preconditioner_dim": 100, "bits": 4},
    "bfloat16 products and exchange": {"matmul_dtype": "bfloat16", "exchange_dtype": "bfloat16", "bits": 4},
}
SHAPE = (300, 128)


def dead_rows_and_columns(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SHAPE[0], generator=generator) < 0.5, torch.rand(SHAPE[1], generator=generator) < 0.3


def trained(optimizer: torch.optim.Optimizer, parameter: Tensor, dead: tuple[Tensor, Tensor], steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradient = torch.randn(SHAPE, generator=generator) * torch.logspace(0, -3, SHAPE[1])
        gradient[dead[0]] = 0.0
        gradient[:, dead[1]] = 0.0
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("base", "options"),
    [*(("adamw", name) for name in OPTIONS), *((base, "compact") for base in BASES if base != "adamw")],
)
def test_what_never_had_a_gradient_stays_where_the_base_leaves_it(base: str, options: str) -> None:
    rule, of_base = BASES[base]
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    dead = dead_rows_and_columns(0)
    ours, alone = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = trained(Shampoo4([ours], lr=1e-2, base=rule, **FAST, **OPTIONS[options], **of_base), ours, dead, 15)
    expected = trained(rule([alone], lr=1e-2, **of_base), alone, dead, 15)
    assert torch.equal(found[dead[0]], expected[dead[0]])
    assert torch.equal(found[:, dead[1]], expected[:, dead[1]])
    assert not torch.equal(found, expected), "the rest is preconditioned"


@pytest.mark.parametrize("options", SOAP)
def test_what_never_had_a_gradient_stays_where_weight_decay_leaves_it(options: str) -> None:
    """With method="soap": a trace of another row that leaks into one's momentum would be scaled to its size by D."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    dead = dead_rows_and_columns(0)
    ours, alone = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Shampoo4([ours], lr=1e-2, weight_decay=0.1, method="soap", statistics_interval=3, **SOAP[options])
    found = trained(optimizer, ours, dead, 15)
    for _ in range(15):
        alone.data.mul_(1 - 1e-2 * 0.1)
    assert torch.equal(found[dead[0]], alone[dead[0]])
    assert torch.equal(found[:, dead[1]], alone[:, dead[1]])
    moved = (found != alone)[~dead[0]][:, ~dead[1]]
    assert moved.float().mean() > 0.99, "the rest has moved"


@pytest.mark.parametrize("options", ["default", "compact", "32 bits", "naive"])
def test_a_block_that_wakes_up_does_not_outweigh_the_others(options: str) -> None:
    """Its statistics are those of its last gradients, however many steps it slept."""
    fast = {"statistics_interval": 1, "root_interval": 2, "min_quant_numel": 0, "max_preconditioner_dim": 32}
    directions = Directions([(64, 64)], **fast, **OPTIONS[options])
    generator = torch.Generator().manual_seed(0)
    for step in range(361):
        gradient = torch.randn(64, 64, generator=generator)
        if 60 <= step < 360:
            gradient[:32, :32] = 0.0
        (found,) = directions.step([gradient])
    assert found is not None
    share = float(found[:32, :32].norm() / found.norm())
    assert 0.4 < share < 0.6, share


@pytest.mark.parametrize("root", ["stored", "rectified"])
def test_roots_of_a_step_without_gradients_are_those_of_the_statistics_that_are_kept(root: str) -> None:
    fast = {"statistics_interval": 1, "root_interval": 2, "shampoo_beta": 0.5, "bits": 8, "grafting": "none"}
    gradients = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    slept, awake = (Directions([(64, 64)], **fast, root=root) for _ in range(2))
    for gradient in (*gradients[:2], torch.zeros(64, 64), torch.zeros(64, 64)):
        slept.step([gradient])
    for gradient in gradients[:2]:
        awake.step([gradient])
    (found,), (expected,) = slept.step([gradients[2]]), awake.step([gradients[2]])
    assert (found - expected).norm() < 0.05 * expected.norm()  # decayed statistics differ by 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_direction_is_rounded_to_the_type_of_its_gradient_once(dtype: torch.dtype) -> None:
    """After grafting: before, a direction may have no room in float16."""
    shapes = [(96, 64)]
    low, exact = (Directions(shapes, min_quant_numel=0, **FAST) for _ in range(2))
    low.parameters[0].data = low.parameters[0].data.to(dtype)
    for step in range(13):
        gradient = 1e-6 * torch.randn(shapes[0], generator=torch.Generator().manual_seed(step)).to(dtype).float()
        if step == 12:
            gradient *= 1e9  # after small ones: the direction is 1e9 times as large as those before
        gradient = gradient.to(dtype).float()
        (expected,) = exact.step([gradient])
        (found,) = low.step([gradient.to(dtype)])
        assert torch.equal(found, expected.to(dtype))


def test_directions_of_float64_parameters_are_scaled_in_float64() -> None:
    directions = Directions([(48, 32)], min_quant_numel=0, bits=32, refresh_dtype="float64", **FAST)
    directions.parameters[0].data = directions.parameters[0].data.double()
    for step in range(6):
        gradient = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (found,) = directions.step([gradient])
    assert abs(found.norm() / gradient.norm() - 1) < 1e-11


def saved_with_former_levels(tmp_path: Any) -> tuple[dict[str, Any], Any]:
    model = nn.Linear(64, 64)
    optimizer = Shampoo4(model.named_parameters(), codebook="normal", **FAST)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("sharded_shampoo4.checkpoint.files.FORMAT_VERSION", 1)
    checkpoint.save(optimizer, tmp_path)
    monkey.undo()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group[state_dict.VERSION_KEY] = 1
    return state, tmp_path


def test_codes_of_levels_without_a_zero_are_refused(tmp_path: Any) -> None:
    state, folder = saved_with_former_levels(tmp_path)
    optimizer = Shampoo4(nn.Linear(64, 64).named_parameters(), codebook="normal", **FAST)
    with pytest.raises(ValueError, match="param group 0 of the state_dict has codebook='normal' in format 1"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="weight in the checkpoint has codebook='normal' in format 1"):
        checkpoint.load(optimizer, folder)


def test_a_state_dict_of_an_earlier_format_is_saved_in_the_present_one() -> None:
    parameter = nn.Parameter(torch.randn(8, 8))
    optimizer = Shampoo4([parameter], **FAST)
    state = optimizer.state_dict()
    state["param_groups"][0][state_dict.VERSION_KEY] = 1
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"][0][state_dict.VERSION_KEY] == state_dict.FORMAT_VERSION


@pytest.mark.parametrize("options", [{}, {"preset": "compact"}], ids=str)
def test_orthogonalized_directions_of_an_idle_matrix_fade(options: dict[str, Any]) -> None:
    """What is left of the momentum becomes too small for its squares; it must not be brought to norm 1."""
    weight, other = nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.zeros(16, 16))
    optimizer = Shampoo4([weight, other], lr=1e-2, weight_decay=0.0, newton_schulz_steps=3, **options)
    for number in range(1200):
        weight.grad = torch.randn(16, 24) if number < 5 else torch.zeros(16, 24)
        other.grad = torch.randn(16, 16)
        if number == 1000:
            before = weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_refresh_without_a_gradient_changes_nothing(bits: int) -> None:
    """The step is that of a run in which no refresh is due, to the bit."""
    weights = [nn.Parameter(torch.ones(70, 66)) for _ in range(2)]
    optimizers = [
        Shampoo4([weight], lr=0.1, bits=bits, interval_warmup=False, statistics_interval=interval)
        for weight, interval in zip(weights, (10, 100), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 12):
        gradient = torch.zeros(70, 66) if number == 10 else torch.randn(70, 66, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights)
