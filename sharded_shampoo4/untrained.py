"""What a model has beside the parameters that are trained: frozen ones, and buffers. A checkpoint may hold them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .integrations import fsdp, zero


@dataclass(frozen=True)
class Untrained:
    """A frozen parameter or a persistent buffer.

    Attributes:
        name: in the model as it was before a host wrapped it.
        held: this rank's elements, in the shape that they have here.
        location: which elements of the whole these are.
        frozen: whether it is a parameter that needs no gradient: neither a buffer nor another optimizer's.
    """

    name: str
    held: Tensor
    location: fsdp.Location
    frozen: bool = False

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        dtype = str(self.held.dtype).removeprefix("torch.")
        return {"shape": list(self.location.shape), "dtype": dtype, "frozen": self.frozen}


def find(model: nn.Module, trained: Iterable[Tensor], bound: Mapping[Tensor, fsdp.Location]) -> list[Untrained]:
    """All that ``model``, wrapped or not, has beside ``trained``; ``bound`` locates parameters of FSDP1.

    Raises:
        ValueError: a frozen parameter's elements on this rank are not one interval of it, or two have one name.
    """
    known, names = set(map(id, trained)), fsdp.names_in(model)
    model = fsdp.unwrapped(model)
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in known]
    found = [of_parameter(names[parameter], parameter, bound) for parameter in frozen]
    for buffer in _persistent_buffers(model):
        found.append(Untrained(names[buffer], _local(buffer), fsdp.locate(names[buffer], buffer, {})))
    return found


def of_parameter(name: str, parameter: Tensor, bound: Mapping[Tensor, fsdp.Location]) -> Untrained:
    """The elements on this rank of a parameter that is not trained."""
    partition = zero.partition(parameter)
    held, location = partition or (_local(parameter), fsdp.locate(name, parameter, bound))
    return Untrained(name, held, location, not parameter.requires_grad)


def _persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    passing = {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    return (buffer for buffer in model.buffers() if id(buffer) not in passing)


def _local(tensor: Tensor) -> Tensor:
    held: Tensor = fsdp.local_tensor(tensor).detach()
    return held
