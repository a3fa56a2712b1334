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
    """

    name: str
    held: Tensor
    location: fsdp.Location

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"shape": list(self.location.shape), "dtype": str(self.held.dtype).removeprefix("torch.")}


def find(model: nn.Module, trained: Iterable[Tensor], bound: Mapping[Tensor, fsdp.Location]) -> list[Untrained]:
    """All that ``model``, wrapped or not, has beside ``trained``; ``bound`` locates parameters of FSDP1.

    Raises:
        ValueError: a frozen parameter's elements on this rank are not one interval of it.
    """
    model, known = fsdp.unwrapped(model), set(map(id, trained))
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            name = fsdp.plain_name(name)
            partition = zero.partition(parameter)
            if partition is None:
                found.append(Untrained(name, _local(parameter), fsdp.locate(name, parameter, bound)))
            else:
                found.append(Untrained(name, *partition))
    for name, buffer in _persistent_buffers(model):
        found.append(Untrained(fsdp.plain_name(name), _local(buffer), fsdp.locate(name, buffer, {})))
    return found


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    passing = {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    return ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in passing)


def _local(tensor: Tensor) -> Tensor:
    held: Tensor = fsdp.local_tensor(tensor).detach()
    return held
