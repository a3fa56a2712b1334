"""What a program changes in param groups between steps counts in the next step."""

from __future__ import annotations

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
