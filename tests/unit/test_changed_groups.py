"""What a program changes in param groups between steps counts in the next step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sharded_shampoo4 import Shampoo4


def parameters(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(8, 8)) for _ in range(count)]


def step(optimizer: Shampoo4, *trained: nn.Parameter) -> None:
    optimizer.zero_grad()
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_a_parameter_moves_to_a_group_without_preconditioner() -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "precondition": False}]
    optimizer = Shampoo4(groups)
    step(optimizer, first, second)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    step(optimizer, first, second)
    assert "exp_avg" in optimizer.state[first] and not optimizer.health()


def test_a_group_is_replaced() -> None:
    (weight,) = parameters(1)
    optimizer = Shampoo4([("weight", weight)])
    step(optimizer, weight)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "precondition": False}
    step(optimizer, weight)
    assert "exp_avg" in optimizer.state[weight] and not optimizer.health()


def test_a_frozen_parameter_loses_its_preconditioner() -> None:
    first, second = parameters()
    optimizer = Shampoo4([("first", first), ("second", second)])
    step(optimizer, first, second)
    second.requires_grad_(False)
    step(optimizer, first)
    optimizer.param_groups[0]["precondition"] = False
    step(optimizer, first)
    second.requires_grad_(True)
    step(optimizer, first, second)
    assert optimizer.state[second]["step"] == 1


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_options_that_matrices_do_not_have_are_refused_later_too(name: str) -> None:
    (weight,) = parameters(1)
    optimizer = Shampoo4([("weight", weight)])
    step(optimizer, weight)
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"{name}=True is an option of the base optimizer"):
        step(optimizer, weight)


def test_a_group_that_is_refused_is_not_added() -> None:
    """Whether its options are wrong, or do not fit the shapes of its parameters."""
    first, second = parameters()
    optimizer = Shampoo4([("first", first)])
    for wrong in ({"bits": 5}, {"split_rows": (3,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            optimizer.add_param_group({"params": [("second", second)], **wrong})
        step(optimizer, first, second)
        assert second not in optimizer.state
    optimizer.add_param_group({"params": [("second", second)]})
    step(optimizer, first, second)
    assert optimizer.health().keys() == {"first", "second"}


@pytest.mark.parametrize("steps", [0, 1])
def test_saved_after_preconditioning_was_given_up(steps: int) -> None:
    """The factors are left out of a state_dict; a copy goes on with them as the original does."""
    (weight,) = parameters(1)
    optimizer = Shampoo4([("weight", weight)])
    step(optimizer, weight)
    optimizer.param_groups[0]["precondition"] = False
    for _ in range(steps):
        step(optimizer, weight)
    state_dict = optimizer.state_dict()
    assert all("preconditioner" not in entry for entry in state_dict["state"].values())
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    Shampoo4([("weight", weight)], precondition=False).load_state_dict(state_dict)


def test_a_copy_keeps_factors_that_are_set_aside() -> None:
    (weight,) = parameters(1)
    optimizer = Shampoo4([("weight", weight)])
    step(optimizer, weight)
    optimizer.param_groups[0]["precondition"] = False
    step(optimizer, weight)
    other_weight, other = copy.deepcopy((weight, optimizer))
    for parameter, taken in ((weight, optimizer), (other_weight, other)):
        taken.param_groups[0]["precondition"] = True
        parameter.grad = torch.ones_like(parameter)
        taken.step()
    assert torch.equal(weight, other_weight) and other.health()["weight"]["steps"] == 2
