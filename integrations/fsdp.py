"""FSDP1, whose parameters do not tell where they lie: call :func:`bind` after the model is wrapped.

Under FSDP1 a rank holds any part of a parameter, even of partial rows, as a flat view; only the wrapped model tells
which. HYBRID_SHARD and NO_SHARD keep several complete copies of a parameter. FSDP2 and HSDP need nothing of this: their
parameters are DTensors (:mod:`sharded_shampoo4.placement`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_shampoo4.hosts import Host
from sharded_shampoo4.placement import check_size
from sharded_shampoo4.planning.shards import Shard, make_shard

# The functions of torch that bring an optimizer's states into the form that FSDP1 gives them.
_STATES_OF_FSDP1 = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "optim_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_load_optim_state_dict"),
)


class Place(NamedTuple):
    """What FSDP1 knows of a parameter.

    Attributes:
        shape: of the whole parameter.
        shard: that this rank holds.
        device: where FSDP1 computes, if it has offloaded the parameter to the host; else None.
    """

    shape: torch.Size
    shard: Shard
    device: torch.device | None = None


class FSDP1Host(Host):
    """FSDP1. ``places`` are those of the parameters of a ``model``, which :func:`bind` reads off it."""

    name_parts = ("_fsdp_wrapped_module",)

    def __init__(self, places: Mapping[Tensor, Place], model: nn.Module | None = None) -> None:
        self.places = dict(places)
        self._units = [] if model is None else [weakref.ref(unit) for unit in _units_of(model)]

    @property
    def units(self) -> list[nn.Module]:
        """The FSDP1 modules of the model that was bound, as long as they exist."""
        return [unit for reference in self._units if (unit := reference()) is not None]

    @classmethod
    def find(cls, optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> Host | None:
        """Return a host without places if FSDP1 has any of ``parameters``: then :func:`bind` is still to come."""
        return cls({}) if any(map(_is_of_fsdp1, parameters)) else None

    @staticmethod
    def reshard(model: nn.Module) -> None:
        """Give up whole weights that a forward pass without gradients has left: the shards are what counts.

        FSDP2 would show them in the shards' place, and both would use them in the next forward pass, whatever the
        shards have become.

        Raises:
            RuntimeError: the program itself has FSDP1's weights whole at the moment.
        """
        module: Any = sys.modules.get("torch.distributed.fsdp")
        for part in model.modules() if module is not None else ():
            if isinstance(part, module.FSDPModule):
                part.reshard()
            elif isinstance(part, module.FullyShardedDataParallel) and _has_run(part):
                if part._handle._training_state == module._common_utils.HandleTrainingState.SUMMON_FULL_PARAMS:
                    raise RuntimeError(
                        "inside FSDP.summon_full_params(), which writes the whole weights back at its end: leave it "
                        "before a checkpoint is saved or loaded"
                    )
                module._runtime_utils._reshard(part, part._handle, True)

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape of the whole parameter."""
        place = self.places.get(parameter)
        return parameter.shape if place is None else place.shape

    def check_parameter(self, name: str, parameter: Tensor, holder: Tensor, preconditioned: bool) -> None:
        """Raise ValueError for parameters that :func:`bind` has not told about: they look like vectors."""
        if preconditioned and parameter not in self.places:
            _refuse_unbound(name, parameter)

    def locate(self, name: str, parameter: Tensor, holder: Tensor) -> tuple[Shard, int]:
        """Return the shard of ``parameter`` on this rank; it begins at the first element of the holder."""
        place = self.places.get(parameter)
        if place is None:
            _refuse_unbound(name, parameter)
            return super().locate(name, parameter, holder)
        check_size(name, parameter, place.shard, place.shape)
        return place.shard, 0

    def compute_device(self, holder: Tensor) -> torch.device:
        """Return where FSDP1 computes, also if it keeps the parameter on the host."""
        place = self.places.get(holder)
        told = None if place is None else place.device
        return super().compute_device(holder) if told is None else told

    def check_state_dict(self) -> None:
        """Raise RuntimeError if FSDP1 is asking for states in its own form, which cannot hold the factors."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _STATES_OF_FSDP1:
                raise RuntimeError(
                    "FSDP.optim_state_dict(), and get_optimizer_state_dict() and set_optimizer_state_dict() under "
                    "FSDP1, cut every state as FSDP1 cuts its parameter, and so cannot hold the factors of Shampoo4: "
                    "call optimizer.consolidate_state_dict() on every rank and save optimizer.state_dict(), or use "
                    "sharded_shampoo4.checkpoint"
                )


def bind(optimizer: Any, model: nn.Module) -> None:
    """Tell ``optimizer`` which part of each parameter it holds under FSDP1, whose parameters do not say so themselves.

    Call it once, after ``model`` has been wrapped and the optimizer constructed.

    Args:
        optimizer: a Shampoo4, or a wrapper with such an ``optimizer`` in it.
        model: holds the FullyShardedDataParallel modules, or is one; made with ``use_orig_params=True``.

    Raises:
        ValueError: no FSDP1 module, ``use_orig_params=False``, FSDP1 together with tensor parallelism, or sharding
            among some of the ranks only.
    """
    while not hasattr(optimizer, "use_host") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "use_host"):
        raise TypeError(f"bind needs a Shampoo4 optimizer, not {type(optimizer).__name__}")
    optimizer.use_host(FSDP1Host(_places(model, getattr(optimizer, "process_group", None)), model))


def _is_of_fsdp1(parameter: Tensor) -> bool:
    """Whether FSDP1 has this parameter: it sets these attributes, and nothing else does."""
    return getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)


def _has_run(unit: Any) -> bool:
    """Whether an FSDP1 module has parameters of its own, which it shards, and was ever called."""
    handle = unit._handle
    return handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard")


def _refuse_unbound(name: str, parameter: Tensor) -> None:
    """Raise ValueError if this is a parameter of FSDP1, which :func:`bind` must tell about."""
    if getattr(parameter, "_is_flat_param", False):
        raise ValueError(f"{name} is a flat parameter of FSDP1: wrap the model with use_orig_params=True")
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is sharded by FSDP1, which does not tell its shape: after the model is wrapped, call "
            "sharded_shampoo4.integrations.fsdp.bind(optimizer, model)"
        )


def _places(model: nn.Module, chosen: dist.ProcessGroup | str | None) -> dict[Tensor, Place]:
    """The places of all parameters that FSDP1 shards in ``model``, among the ``chosen`` ranks or all."""
    units = _units_of(model)
    if not units:
        raise ValueError("the model has no FullyShardedDataParallel (FSDP1) module: only under FSDP1 is bind needed")
    found: dict[Tensor, Place] = {}
    for unit in units:
        if unit._handle is not None:  # None: it has no parameters of its own
            found.update(_unit_places(unit, chosen))
    return found


def _units_of(model: nn.Module) -> list[Any]:
    """The FSDP1 modules in ``model``."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return list(FullyShardedDataParallel.fsdp_modules(model))


def _unit_places(unit: Any, chosen: dist.ProcessGroup | str | None) -> Iterator[tuple[Tensor, Place]]:
    """The parameters that one FSDP1 module shards, and their places."""
    flat = unit._handle.flat_param
    if flat._params is None:
        raise ValueError("FSDP1 was made with use_orig_params=False, which leaves no matrices to precondition")
    replica = _unit_replica(unit, chosen)
    computes = unit.compute_device if flat.device.type == "cpu" and unit.compute_device.type != "cpu" else None
    fields = (flat._params, flat._fqns, flat._shapes, flat._strides, flat._param_extensions, flat._shard_param_infos)
    for parameter, name, shape, stride, extension, shard in zip(*fields, strict=True):
        if extension is not None:
            raise ValueError(
                f"{name} is sharded by FSDP1 and by tensor parallelism, which is not supported: shard it by FSDP alone"
            )
        if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
            raise ValueError(
                f"{name} of shape {tuple(shape)} has strides {tuple(stride)}, in whose order FSDP1 has cut it: make it "
                "contiguous before the model is wrapped"
            )
        start, stop = (shard.intra_param_start_idx, shard.intra_param_end_idx + 1) if shard.in_shard else (0, 0)
        yield parameter, Place(torch.Size(shape), make_shard(start, stop, replica), computes)


def _unit_replica(unit: Any, chosen: dist.ProcessGroup | str | None) -> int:
    """Which copy of an FSDP1 module's parameters this rank has a part of."""
    across = getattr(unit, "_inter_node_pg", None)  # HYBRID_SHARD: the ranks that hold the same shard
    ranks = unit.process_group.size() * (1 if across is None else across.size())
    wanted = 1 if isinstance(chosen, str) else dist.get_world_size(chosen)
    if ranks != wanted and isinstance(chosen, str):
        raise ValueError(
            f"process_group={chosen!r}, but FSDP1 shards a module among {ranks} ranks: leave process_group out, or "
            "give their group"
        )
    if ranks != wanted:
        raise ValueError(
            f"FSDP1 shards a module among {ranks} of {dist.get_world_size()} ranks: it must be all, or those of "
            f"Shampoo4(..., process_group=), which has {wanted}"
        )
    if not unit._handle.uses_sharded_strategy:
        return dist.get_rank()
    return 0 if across is None else int(across.rank())
