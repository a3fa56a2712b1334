"""What a model has beside the parameters that are trained: frozen ones, and buffers. A checkpoint may hold them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Host
from ..names import names_in, unwrapped
from ..placement import local_tensor, locate
from ..planning.shards import Shard


@dataclass(frozen=True)
class Untrained:
    """A frozen parameter or a persistent buffer.

    Attributes:
        name: in the model as it was before a host wrapped it.
        held: this rank's elements, in the shape that they have here.
        shape: of the whole.
        shard: which elements of the whole these are.
        frozen: whether it is a parameter that needs no gradient: neither a buffer nor another optimizer's.
    """

    name: str
    held: Tensor
    shape: torch.Size
    shard: Shard
    frozen: bool = False

    def check(self) -> None:
        """Raise ValueError unless it is dense, with a place in memory for each of its elements."""
        way_out = "or leave it out: a buffer by persistent=False, a frozen parameter by frozen=False"
        if self.held.layout != torch.strided:
            raise ValueError(
                f"{self.name} has layout {self.held.layout}, and portable checkpoints hold strided tensors: make it "
                f"dense, {way_out}"
            )
        shape, strides = tuple(self.held.shape), self.held.stride()
        if self.held.numel() and any(size > 1 and not stride for size, stride in zip(shape, strides, strict=True)):
            raise ValueError(
                f"{self.name} of shape {shape} has several elements in one place in memory (strides {strides}), so it "
                f"cannot be loaded: make it contiguous(), {way_out}"
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        dtype = str(self.held.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "frozen": self.frozen}


def find(model: nn.Module, trained: Iterable[Tensor], host: Host) -> list[Untrained]:
    """All that ``model``, wrapped or not, has beside ``trained``; ``host`` knows where they lie.

    Raises:
        ValueError: a frozen parameter's elements on this rank are not one interval of it, or two have one name.
    """
    known, names = set(map(id, trained)), names_in(model)
    model = unwrapped(model)
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in known]
    found = [of_parameter(names[parameter], parameter, host) for parameter in frozen]
    for buffer in _persistent_buffers(model):
        found.append(
            Untrained(names[buffer], local_tensor(buffer).detach(), buffer.shape, locate(names[buffer], buffer))
        )
    return found


def of_parameter(name: str, parameter: Tensor, host: Host) -> Untrained:
    """The elements on this rank of a parameter that is not trained."""
    held, shard = host.frozen_part(name, parameter)
    return Untrained(name, held, host.shape(parameter), shard, not parameter.requires_grad)


def _persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    passing = {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    return (buffer for buffer in model.buffers() if id(buffer) not in passing)
