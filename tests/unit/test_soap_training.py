"""method="soap" in training loops: what it does to weights, what is the base's, and what stands in the states.

Most of what holds for both methods is in test_optimizer.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint, estimate_memory

FAST: dict[str, Any] = {"method": "soap", "statistics_interval": 2, "max_preconditioner_dim": 40}
SHAPES = {"first": (48, 20), "bias": (48,), "norm": (20,), "second": (7, 5, 3), "none": (20, 30)}
RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "a class": (torch.optim.RAdam, {"eps": 1e-6}),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """Every parameter has one but "none"; "second" in even steps only."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if name == "none" or (name == "second" and step % 2) else gradient


def train(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        give_gradients(named, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in named.values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_matrices_go_along_their_directions_and_the_rest_is_the_bases(name: str) -> None:
    """W <- (1 - lr weight_decay) W - lr direction, whatever the base; vectors are bitwise as torch's rule alone."""
    rule, options = RULES[name]
    lr, decay = 2.0**-6, options.get("weight_decay", 0.0)
    named, twins = parameters(), parameters()
    optimizer = Shampoo4(named.items(), base=rule, lr=lr, **FAST, **options)
    plain = rule([twins["bias"], twins["norm"]], lr=lr, **options)
    for step in range(7):
        give_gradients(named, step)
        give_gradients(twins, step)
        expected = {key: named[key].detach() * (1 - lr * decay) for key in ("first", "second")}
        before = named["second"].detach().clone()
        optimizer.step()
        plain.step()
        for key in ("bias", "norm"):
            assert torch.equal(named[key], twins[key]), (step, key)
        assert torch.equal(named["none"], twins["none"])
        for key, value in expected.items():
            if named[key].grad is None:
                assert torch.equal(named[key], before), "neither a step nor weight decay without a gradient"
                continue
            assert not torch.equal(named[key].grad, twins[key].grad)
            assert torch.equal(named[key], value.add(named[key].grad, alpha=-lr)), (step, key)


def test_a_model_without_matrices_trains_as_adamw_does() -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    ours, theirs = ([nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(1, 30))] for _ in range(2))
    optimizer, plain = Shampoo4(ours, method="soap", **options), torch.optim.AdamW(theirs, **options)
    with pytest.warns(UserWarning, match="no matrix to precondition"):
        for step in range(5):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
                b.grad = a.grad.clone()
            optimizer.step()
            plain.step()
    assert same(ours, theirs)
    assert optimizer.state_bytes()["base"] == sum(2 * 4 * p.numel() + 4 for p in ours)


@pytest.mark.parametrize("name", ["learning rate", "group"])
def test_a_learning_rate_as_a_tensor(name: str) -> None:
    """A power of two, which is the same number in float32."""
    named, twins = parameters(), parameters()
    lr = torch.tensor(2.0**-6)
    optimizer = Shampoo4(named.items(), lr=lr, weight_decay=0.5, **FAST)
    other = Shampoo4(twins.items(), lr=2.0**-6, weight_decay=0.5, **FAST)
    if name == "group":  # changed in place, as a scheduler does
        lr.fill_(2.0**-7)
        other.param_groups[0]["lr"] = 2.0**-7
    train(named, optimizer, range(5))
    train(twins, other, range(5))
    for key in ("first", "second"):  # torch's own AdamW rounds otherwise then
        assert torch.equal(named[key], twins[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_rounded_once(dtype: torch.dtype) -> None:
    lr, decay = 2.0**-6, 0.5
    named = parameters(dtype)
    optimizer = Shampoo4(named.items(), lr=lr, weight_decay=decay, **FAST)
    for step in range(4):
        give_gradients(named, step)
        before = named["first"].detach().float()
        optimizer.step()
        direction = named["first"].grad
        assert direction is not None and direction.dtype == dtype
        expected = (before * (1 - lr * decay) - direction.float() * lr).to(dtype)
        assert torch.equal(named["first"], expected)


# -- whose states ------------------------------------------------------------------------------------------------------


def test_the_base_keeps_nothing_of_a_matrix() -> None:
    named = parameters()
    optimizer = Shampoo4(named.items(), **FAST)
    train(named, optimizer, range(3))
    kept = {name: sorted(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}
    moments = ["exp_avg", "exp_avg_sq", "step"]
    assert kept == {
        "first": ["preconditioner"], "second": ["preconditioner"], "bias": moments, "norm": moments
    }  # fmt: skip
    estimate = estimate_memory(named.items(), host="none", **FAST)
    assert optimizer.state_bytes()["preconditioner"] == estimate.preconditioner[0]
    assert optimizer.state_bytes()["base"] == 2 * 4 * (48 + 20) + 2 * 4
    entry = optimizer.state_dict()["state"][0]
    assert list(entry) == ["preconditioner"] and entry["preconditioner"].dtype == torch.uint8


def test_a_group_that_is_left_to_the_base_and_taken_back() -> None:
    """Its factors wait, the base begins anew, and nothing of the base's is left when it has ended."""
    named, twins = parameters(), parameters()
    optimizer = Shampoo4([{"params": list(named.items())}], lr=1e-2, weight_decay=0.1, **FAST)
    train(named, optimizer, range(3))
    group = optimizer.param_groups[0]
    steps = optimizer.health()["first"]["steps"]
    with torch.no_grad():
        for key, parameter in named.items():
            twins[key].copy_(parameter)
    group["precondition"] = False
    plain = torch.optim.AdamW([twins["first"], twins["second"]], lr=1e-2, weight_decay=0.1)
    for step in range(3, 6):
        give_gradients(named, step)
        give_gradients(twins, step)
        optimizer.step()
        plain.step()
    for key in ("first", "second"):
        assert torch.equal(named[key], twins[key])
    held = optimizer.state_bytes()
    group["precondition"] = True
    train(named, optimizer, range(6, 8))
    assert sorted(optimizer.state[named["first"]]) == ["preconditioner"]
    assert optimizer.state_bytes()["base"] == held["base"] - 2 * 4 * (48 * 20 + 7 * 15) - 2 * 4
    assert optimizer.health()["first"]["steps"] == steps + 2


def test_factors_and_moments_of_a_frozen_parameter_are_saved_and_go_on() -> None:
    named = parameters()
    optimizer = Shampoo4(named.items(), lr=1e-2, **FAST)
    train(named, optimizer, range(3))
    named["first"].grad = None
    named["first"].requires_grad_(False)
    others = {name: p for name, p in named.items() if name != "first"}
    train(others, optimizer, range(3, 5))
    again = copy.deepcopy(named)
    second = Shampoo4(again.items(), lr=1e-2, **FAST)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own in (named, again):
        own["first"].requires_grad_(True)
    assert same(train(named, optimizer, range(5, 9)), train(again, second, range(5, 9)))
    assert optimizer.health()["first"]["steps"] == 7
    assert second.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("how", ["steps", "state_dict", "checkpoint"])
def test_cleared_states_begin_anew(how: str, tmp_path: Any) -> None:
    """Those that a step, a load_state_dict or a portable checkpoint has brought."""
    named = parameters()
    optimizer = Shampoo4(named.items(), lr=1e-2, **FAST)
    train(named, optimizer, range(3))
    if how == "state_dict":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "checkpoint":
        checkpoint.save(optimizer, tmp_path)
        checkpoint.load(optimizer, tmp_path)
    fresh = copy.deepcopy(named)
    other = Shampoo4(fresh.items(), lr=1e-2, **FAST)
    optimizer.state.clear()
    assert list(optimizer.state_dict()["state"]) == ([] if how == "state_dict" else [4])  # which is as new
    assert same(train(named, optimizer, range(3, 8)), train(fresh, other, range(3, 8)))


def test_states_of_one_matrix_that_are_cleared() -> None:
    named = parameters()
    optimizer = Shampoo4(named.items(), lr=1e-2, **FAST)
    train(named, optimizer, range(4))
    del optimizer.state[named["first"]]
    train(named, optimizer, range(4, 6))
    steps = {name: found["steps"] for name, found in optimizer.health().items()}
    assert steps == {"first": 2, "second": 3, "none": 0}


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_options_of_the_base_that_matrices_would_ignore(name: str) -> None:
    message = f"{name}=True is an option of the base optimizer, which matrices with method='soap'"
    with pytest.raises(ValueError, match=message):
        Shampoo4(parameters().items(), method="soap", **{name: True})
    group = {"params": list(parameters().items()), "method": "soap", name: True}
    with pytest.raises(ValueError, match=f"param group 0: {message}"):
        Shampoo4([group])
    with pytest.raises(ValueError, match=message):
        estimate_memory(parameters().items(), host="none", method="soap", **{name: True})
    named, twins = parameters(), parameters()
    optimizer = Shampoo4([{"params": list(named.items()), "precondition": False, name: True}], method="soap")
    plain = torch.optim.AdamW(twins.values(), weight_decay=0.0, **{name: True})
    assert same(train(named, optimizer, range(3)), train(twins, plain, range(3)))


@pytest.mark.parametrize("saved", ["shampoo", "soap"])
def test_states_of_the_other_method_are_refused(saved: str, tmp_path: Any) -> None:
    here = {"shampoo": "soap", "soap": "shampoo"}[saved]
    named = parameters()
    optimizer = Shampoo4(named.items(), method=saved)
    train(named, optimizer, range(2))
    checkpoint.save(optimizer, tmp_path)
    other = Shampoo4(parameters().items(), method=here)
    message = f"has method='{saved}' where this optimizer has method='{here}'"
    with pytest.raises(ValueError, match=f"param group 0 of the state_dict {message}"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"first in the checkpoint {message}"):
        checkpoint.load(other, tmp_path)
    optimizer.param_groups[0]["method"] = here
    give_gradients(named, 2)
    with pytest.raises(ValueError, match=f"first {message}"):
        optimizer.step()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_gradients_that_are_not_finite_are_counted_and_raised(bits: int) -> None:
    """At the end of an interval; before that the factors stay what they were."""
    named = parameters()
    optimizer = Shampoo4(named.items(), bits=bits, max_failures=2, interval_warmup=False, min_quant_numel=0, **FAST)
    train(named, optimizer, range(3))

    def step() -> None:
        give_gradients(named, 3)
        named["first"].grad[0, 0] = torch.nan  # type: ignore[index]
        optimizer.step()

    step()
    assert optimizer.health()["first"]["failures"] == 1 and optimizer.health()["second"]["failures"] == 0
    step()
    before = named["second"].detach().clone()
    with pytest.raises(RuntimeError, match=r"preconditioner of first, block .* failed to update 2 times in a row"):
        step()
    assert torch.equal(named["second"], before)


@pytest.mark.parametrize("size", [1e17, 1e20, 1e22, 1e30])
@pytest.mark.parametrize("at", [7, 10])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8", "factored"])
def test_one_gradient_whose_square_overflows_does_not_stop_a_block(kept: str, at: int, size: float) -> None:
    """In a step with new eigenbases, and between two of them. Its second moments begin anew with the next ones."""
    torch.manual_seed(0)
    start = torch.randn(16, 24)
    weight = nn.Parameter(start.clone())
    optimizer = Shampoo4([weight], lr=0.01, min_quant_numel=64, second_moment_dtype=kept, interval_warmup=False)
    for step in range(20):
        weight.grad = torch.randn(16, 24)
        if step == at:
            weight.grad[3, 5] = size
        before = weight.detach().clone()
        optimizer.step()
    moved = (weight - before).abs()
    assert min(moved.amax(0).amin(), moved.amax(1).amin()) > 1e-3 and (moved > 1e-5).float().mean() > 0.98
    assert (weight - start).abs().amax() < 1


def test_nothing_moves_if_the_base_refuses_its_parameters() -> None:
    """A sparse gradient of a vector is AdamW's to refuse."""
    matrix, vector = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(8))
    optimizer = Shampoo4([matrix, vector], lr=0.1)
    matrix.grad, vector.grad = torch.randn(20, 30), torch.ones(8).to_sparse()
    before = matrix.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(matrix, before)
