"""What the optimizer asks of a framework that arranges parameters, its *host*.

:class:`Host` is the protocol: its methods answer for plain tensors and DTensors, that is for plain PyTorch, DDP, FSDP2
and HSDP. A framework that arranges parameters in another way has a subclass in ``integrations/``, which overrides what
is different. ``ADAPTERS`` names these subclasses: this is the only place where the core mentions them. They are
imported when the first parameters are given to an optimizer, and asked in turn whether the parameters are theirs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import placement
from .planning.shards import Shard

# Subclasses of Host, or where they are: "module:class".
ADAPTERS: list[str | type[Host]] = [
    "sharded_shampoo4.integrations.zero:ZeroHost",
    "sharded_shampoo4.integrations.fsdp:FSDP1Host",
    "sharded_shampoo4.integrations.callers:AccelerateHost",
]


class FlatTensor(NamedTuple):
    """A tensor that stands in a param group and holds parts of several parameters, one after another.

    Attributes:
        tensor: what stands in the group.
        parameters: those that it holds parts of, on whatever rank, in an order that all ranks share.
        call: equal for all flat tensors of one call of ``step()``, different for others, the same on every rank; an
            integer or a pair of a word and an integer, which tells the order of the calls.
    """

    tensor: Tensor
    parameters: list[Tensor]
    call: Hashable


class Host:
    """How a framework arranges the parameters of one optimizer. The answers here are those of plain PyTorch.

    Attributes:
        name_parts: parts that the framework puts into parameters' names, and no model does.
        engine: the framework's own object that calls ``optimizer.step()``, if it has one.
    """

    name_parts: ClassVar[tuple[str, ...]] = ()
    engine: Any = None

    # -- about models and optimizers, whatever their host --------------------------------------------------------------

    @classmethod
    def find(cls, optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> Host | None:
        """Return a host if the framework has arranged any of ``parameters``, or is calling ``optimizer``; else None."""
        return None

    @classmethod
    def of_engine(cls, handle: Any) -> tuple[Host, Optimizer] | None:
        """Return the host and the optimizer of ``handle`` if it is the framework's engine; else None."""
        return None

    @staticmethod
    def is_wrapper(module: Any) -> bool:
        """Return whether ``module`` is the framework's, and keeps the model that it wraps as ``module.module``."""
        return False

    @staticmethod
    def reshard(model: nn.Module) -> None:
        """Give up whole weights that a forward pass without gradients has left in the shards' place."""

    @staticmethod
    def saving_advice(optimizer: Optimizer) -> str:
        """Return what to do if the framework that is calling ``optimizer`` will fail to save it; empty otherwise."""
        return ""

    # -- about one parameter -------------------------------------------------------------------------------------------

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape of the whole parameter."""
        return parameter.shape

    def check_parameter(self, name: str, parameter: Tensor, holder: Tensor, preconditioned: bool) -> None:
        """Raise ValueError, saying what to do, if a parameter cannot be trained; ``holder`` stands in its group."""

    def locate(self, name: str, parameter: Tensor, holder: Tensor) -> tuple[Shard, int]:
        """Return the shard of ``parameter`` on this rank, and where it begins in the flattened ``holder``.

        The holder is what stands in the group: the parameter itself, or a flat tensor.
        """
        return placement.locate(name, parameter), 0

    def frozen_part(self, name: str, parameter: Tensor) -> tuple[Tensor, Shard]:
        """Return this rank's elements of a parameter that is not trained, and which elements of the whole these are."""
        shard, _ = self.locate(name, parameter, parameter)
        return placement.local_tensor(parameter).detach(), shard

    def compute_device(self, holder: Tensor) -> torch.device:
        """Return the device on which the gradient of ``holder`` is exchanged and preconditioned."""
        return placement.compute_device(holder)

    # -- about flat tensors --------------------------------------------------------------------------------------------

    def has_flat_tensors(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether flat tensors stand in the groups in place of any of ``parameters``."""
        return False

    def flat_tensors(self, group: int, standing: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[FlatTensor]:
        """Return all flat tensors with parts of a group's ``parameters``; ``standing`` is what the group has now."""
        return []

    @property
    def steps_once(self) -> bool:
        """Whether ``step()`` is given all flat tensors together."""
        return True

    # -- about the framework's engine ----------------------------------------------------------------------------------

    def names(self) -> Mapping[Tensor, str]:
        """Return the names that the engine knows parameters by."""
        return {}

    def check(self, process_group: Any, first: str) -> None:
        """Raise ValueError if the framework runs with a feature that was not tested.

        Args:
            process_group: as the optimizer was given it.
            first: name of a parameter, for messages.
        """

    @property
    def total_steps(self) -> int | None:
        """The length of the training in steps, if the engine's configuration has it."""
        return None

    def check_state_dict(self) -> None:
        """Raise RuntimeError if the framework is asking for states in a form that cannot hold the factors."""

    def progress(self) -> dict[str, Any] | None:
        """Return what the engine keeps beside weights and states, as plain values; None without an engine."""
        return None

    def restore_progress(self, saved: Mapping[str, Any]) -> None:
        """Give the engine back what :meth:`progress` returned."""

    def refresh_weights(self) -> None:
        """Make the model's weights those of the optimizer, after these were loaded; collective."""


@functools.cache
def _load(place: str) -> type[Host]:
    module, _, name = place.partition(":")
    try:
        adapter: type[Host] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == "sharded_shampoo4.integrations":
            raise ImportError(
                "sharded_shampoo4 is imported from a checkout in which it is not installed: run pip install -e ."
            ) from error
        raise
    return adapter


def adapters() -> list[type[Host]]:
    """Return the classes that ``ADAPTERS`` names."""
    return [_load(adapter) if isinstance(adapter, str) else adapter for adapter in ADAPTERS]


def find_host(optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> Host:
    """Return the host of ``parameters``, which an ``optimizer`` has or is about to get."""
    found = (adapter.find(optimizer, parameters) for adapter in adapters())
    return next((host for host in found if host is not None), None) or Host()


def of_engine(handle: Any) -> tuple[Host, Optimizer] | None:
    """Return the host and the optimizer of ``handle`` if it is a framework's engine; else None."""
    return next((found for adapter in adapters() if (found := adapter.of_engine(handle)) is not None), None)


def is_wrapper(module: Any) -> bool:
    """Return whether ``module`` is a framework's, and keeps the model that it wraps as ``module.module``."""
    return any(adapter.is_wrapper(module) for adapter in adapters())


def reshard(model: nn.Module) -> None:
    """Give up whole weights that a forward pass without gradients has left: the shards are what counts."""
    for adapter in adapters():
        adapter.reshard(model)


def saving_advice(optimizer: Optimizer) -> str:
    """Return what to do if a framework that is calling ``optimizer`` will fail to save it; empty otherwise."""
    return next((advice for adapter in adapters() if (advice := adapter.saving_advice(optimizer))), "")


def name_parts() -> set[str]:
    """Return the parts that frameworks put into parameters' names."""
    return {part for adapter in adapters() for part in adapter.name_parts}
