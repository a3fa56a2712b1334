"""Models that are converted after the optimizer was made: torch swaps the contents of their parameters then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from support import worlds as hosts
from support.contract import FAST
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sharded_shampoo4 import Shampoo4

CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "cpu()": lambda model: model.cpu(),
    "float()": lambda model: model.float(),
    "to_empty()": lambda model: emptied(model),
    "load_state_dict()": lambda model: model.load_state_dict(model.state_dict()),
}


def emptied(model: nn.Module) -> None:
    """Make the parameters anew with the same values, as after a stay elsewhere."""
    values = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(values)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 12))


def trained(model: nn.Module, convert: Callable[[nn.Module], object] | None) -> list[Tensor]:
    """The parameters after three steps, the model ``convert``\\ ed before each of them."""
    optimizer = Shampoo4(model.named_parameters(), **FAST)
    inputs = torch.linspace(-1, 1, 8 * 24).view(8, 24)
    for _ in range(3):
        if convert is not None:
            convert(model)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def compare_under_fsdp2(rank: int) -> list[str]:
    """The conversions after which training differs."""
    found = []
    whole = trained(fully_shard(make_model()), None)
    for name, convert in CONVERSIONS.items():
        other = trained(fully_shard(make_model()), convert)
        if not all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(whole, other, strict=True)):
            found.append(name)
    return found


def test_conversions_under_fsdp2() -> None:
    """Also before the first step, as programs do that keep a model on the host until it is trained."""
    assert hosts.run_ranks(2, compare_under_fsdp2) == [[], []]


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("name", ["float()", "load_state_dict()"])
def test_conversions_of_plain_parameters_that_torch_swaps(name: str, swapping: None) -> None:
    """From the first step on: until then a framework may put others in their places, and free these."""
    conversions = iter([lambda model: None, CONVERSIONS[name], CONVERSIONS[name]])
    whole, other = trained(make_model(), None), trained(make_model(), lambda model: next(conversions)(model))
    assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
