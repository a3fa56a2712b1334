"""What a step looks at again, and what it takes from before: nothing that has changed since may be overlooked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.meta_steps import FakeRanks
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from sharded_shampoo4 import base as bases
from sharded_shampoo4.base import Base
from sharded_shampoo4.held import describe_tensors
from sharded_shampoo4.placement import local_tensor, local_tensors

SHAPES = {"w": (8, 6)}


@pytest.fixture
def sharded() -> Iterator[Any]:
    """A parameter as FSDP2 makes it, with a gradient."""
    with FakeRanks(1, 4, SHAPES, "cpu") as ranks:
        yield with_gradient(ranks.parameters()["w"])


def with_gradient(parameter: Any) -> Any:
    parameter.grad = torch.ones_like(parameter)
    return parameter


def placed(like: Any, *placements: Any, value: float = 1.0) -> DTensor:
    """A DTensor with other ``placements`` than ``like``, and as many elements on this rank."""
    local = torch.full_like(like._local_tensor, value)
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(local, like.device_mesh, placements, **layout)


def swap(parameter: Any, other: Any) -> None:
    """Make ``parameter`` what ``other`` is, as ``model.to()`` does under FSDP2."""
    parameter.grad = None  # torch swaps no tensor with one
    torch.utils.swap_tensors(parameter, nn.Parameter(other))
    with_gradient(parameter)


def drop_gradient(parameter: Any) -> None:
    parameter.grad = None


def freeze(parameter: Any) -> None:
    parameter.requires_grad = False


def change_type(parameter: Any) -> None:
    swap(parameter, parameter.detach().to(torch.bfloat16))


def change_device(parameter: Any) -> None:
    swap(parameter, parameter.detach().to("meta"))


def change_shape(parameter: Any) -> None:
    swap(parameter, torch.zeros_like(parameter.detach()[:, :3]))


def replicate(parameter: Any) -> None:
    swap(parameter, placed(parameter, Replicate()))


def leave_gradient_partial(parameter: Any) -> None:
    parameter.grad = placed(parameter, Partial())


def make_gradient_plain(parameter: Any) -> None:
    parameter.grad = torch.ones(parameter.shape)


def make_gradient_sparse(parameter: Any) -> None:
    parameter.grad = torch.ones_like(parameter).to_sparse()


CHANGES: list[Callable[[Any], None]] = [drop_gradient, freeze, change_type, change_device, change_shape]
OF_SHARDED = [*CHANGES, replicate, leave_gradient_partial, make_gradient_plain]
OF_PLAIN = [*CHANGES, make_gradient_sparse]


def check_that_it_is_noticed(change: Callable[[Any], None], parameter: Any) -> None:
    groups: list[dict[str, Any]] = [{"params": [parameter]}]
    before = describe_tensors(groups)
    with_gradient(parameter)
    assert describe_tensors(groups) == before
    change(parameter)
    assert describe_tensors(groups) != before


@pytest.mark.parametrize("change", OF_SHARDED)
def test_a_change_of_a_sharded_parameter_is_noticed(change: Callable[[Any], None], sharded: Any) -> None:
    check_that_it_is_noticed(change, sharded)


@pytest.mark.parametrize("change", OF_PLAIN)
def test_a_change_of_a_plain_parameter_is_noticed(change: Callable[[Any], None]) -> None:
    check_that_it_is_noticed(change, with_gradient(nn.Parameter(torch.zeros(8, 6))))


def test_another_parameter_is_noticed(sharded: Any) -> None:
    other = with_gradient(nn.Parameter(sharded.detach().clone()))
    assert describe_tensors([{"params": [sharded]}]) != describe_tensors([{"params": [other]}])


# -- the base's steps on local tensors ---------------------------------------------------------------------------------


def sgd_after_a_step(parameter: Any) -> tuple[Base, list[dict[str, Any]], dict[Any, Any]]:
    """SGD with a momentum of 1/2: its buffer is 1 now, and the parameter -1."""
    base = Base("sgd", 1.0, options={"momentum": 0.5})
    groups: list[dict[str, Any]] = [{**base.defaults, "params": [parameter]}]
    states: dict[Any, Any] = defaultdict(dict)
    with torch.no_grad():
        base.step(groups, states)
    assert bool((local_tensor(parameter) == -1).all())
    return base, groups, states


def test_states_that_were_replaced_are_stepped_on(sharded: Any) -> None:
    base, groups, states = sgd_after_a_step(sharded)
    for value in (10.0, 20.0):
        swap(sharded, torch.zeros_like(sharded.detach()))  # the local tensor is another one too
        states[sharded] = {"momentum_buffer": placed(sharded, *sharded.placements, value=value)}
        with torch.no_grad():
            base.step(groups, states)
        states[sharded]["momentum_buffer"] = placed(sharded, *sharded.placements, value=2 * value)
        with torch.no_grad():
            base.step(groups, states)
        buffer = local_tensor(states[sharded]["momentum_buffer"])
        assert bool((buffer == value + 1).all())
        assert bool((local_tensor(sharded) == -(value / 2 + 1) - (value + 1)).all())


@pytest.mark.parametrize("change", [leave_gradient_partial, make_gradient_plain])
def test_gradients_with_other_placements_are_not_taken_for_local_ones(
    change: Callable[[Any], None], sharded: Any
) -> None:
    _, groups, states = sgd_after_a_step(sharded)
    with bases._held(groups, states) as (held, _):
        assert held[0]["params"] == [sharded._local_tensor]
    change(sharded)
    with bases._held(groups, states) as (held, of_held):
        assert held is groups and of_held is states and sharded._local_tensor.grad is None


def test_a_parameter_without_states_keeps_all_dtensors(sharded: Any) -> None:
    _, groups, states = sgd_after_a_step(sharded)
    states.clear()
    with bases._held(groups, states) as (held, _):
        assert held is groups


def test_local_gradients_are_let_go_after_a_step_that_fails(sharded: Any) -> None:
    _, groups, states = sgd_after_a_step(sharded)
    with pytest.raises(KeyError), bases._held(groups, states) as (held, _):
        assert held[0]["params"][0].grad is sharded.grad._local_tensor
        raise KeyError
    assert sharded._local_tensor.grad is None


def test_many_local_tensors_are_those_of_each(sharded: Any) -> None:
    tensors = [sharded, torch.zeros(2), sharded.grad]
    assert all(a is local_tensor(b) for a, b in zip(local_tensors(tensors), tensors, strict=True))
