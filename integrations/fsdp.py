"""Where the rows live: plain PyTorch, DDP, FSDP1, FSDP2 and HSDP.

Under each of them a rank holds one contiguous interval of every flattened (row-major) parameter, possibly an empty one:

=========  ===============================================  =============================================
host       what a parameter is                              what tells its interval
=========  ===============================================  =============================================
none, DDP  the whole tensor on every rank                   its shape
FSDP2      a DTensor, Shard(0): whole rows                  its mesh and placements
HSDP       a DTensor, (Replicate(), Shard(0))               its mesh and placements
FSDP1      a flat view of any part, even of partial rows    the wrapped model only: hence :func:`bind`
=========  ===============================================  =============================================

DDP, HSDP and FSDP1's HYBRID_SHARD and NO_SHARD keep several complete copies of a parameter: its replicas.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# What FSDP1, activation checkpointing and torch.compile put into names; no model has modules of such names itself.
_MARKS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

# The functions of torch that bring an optimizer's states into the form that FSDP1 gives them.
_STATES_OF_FSDP1 = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "optim_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_load_optim_state_dict"),
)


@dataclass(frozen=True)
class Location:
    """The contiguous interval of a flattened (row-major) parameter that this rank holds.

    Attributes:
        shape: shape of the whole parameter.
        start: first element held.
        stop: one past the last element held; ``start == stop == 0`` if nothing is held.
        replica: which complete copy of the parameter this rank belongs to: 0 where there is only one, the rank where
            every rank holds everything.
        device: where FSDP1 computes a parameter that it has offloaded to the host.
    """

    shape: torch.Size
    start: int
    stop: int
    replica: int
    device: torch.device | None = None


def locate(name: str, parameter: Tensor, bound: Mapping[Tensor, Location]) -> Location:
    """The interval of ``parameter`` that this rank holds.

    Args:
        name: of the parameter, for messages.
        parameter: as the optimizer has it.
        bound: what :func:`bind` found out about FSDP1's parameters.

    Raises:
        ValueError: some rank's elements are not one interval, or there is no telling which they are. Placements are
            refused on every rank alike, whatever its own part.
    """
    location = bound.get(parameter)
    if location is None:
        refuse_unbound(name, parameter)
        dtensor = _as_dtensor(parameter)
        location = _whole(parameter.shape) if dtensor is None else _locate_dtensor(name, dtensor)
    held = local_tensor(parameter).numel()
    if held != location.stop - location.start:
        raise ValueError(
            f"{name} has {held} elements on this rank where elements {location.start} to {location.stop} of "
            f"{tuple(location.shape)} were expected: its shards have changed"
        )
    return location


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor behind a DTensor, in the same storage; any other tensor itself."""
    dtensor = _as_dtensor(tensor)
    return tensor if dtensor is None else dtensor._local_tensor


def compute_device(tensor: Tensor) -> torch.device:
    """Where a gradient like ``tensor`` is exchanged and preconditioned.

    A DTensor that is offloaded to the host (FSDP2's CPUOffloadPolicy) goes to the accelerator of its mesh: that is
    faster, and the process group may not be able to send from the host.
    """
    dtensor = _as_dtensor(tensor)
    if dtensor is None:
        return tensor.device
    held, mesh = dtensor._local_tensor.device, dtensor.device_mesh.device_type
    device: torch.device = _current_device(mesh) if held.type == "cpu" and mesh != "cpu" else held
    return device


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without DistributedDataParallel, a DeepSpeed engine or torch.compile around it."""
    while True:
        if _is_wrapper(model):
            model = model.module  # type: ignore[assignment]
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def reshard(model: nn.Module) -> None:
    """Give up whole weights that a forward pass without gradients has left: the shards are what counts.

    FSDP2 would show them in the shards' place, and both would use them in the next forward pass, whatever the shards
    have become.
    """
    module: Any = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):
            part.reshard()
        elif isinstance(part, module.FullyShardedDataParallel) and _has_run(part):
            module._runtime_utils._reshard(part, part._handle, True)


def _has_run(unit: Any) -> bool:
    """Whether an FSDP1 module has parameters of its own, which it shards, and was ever called."""
    handle = unit._handle
    return handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard")


def refuse_unbound(name: str, parameter: Tensor) -> None:
    """Raise ValueError if this is a parameter of FSDP1, which :func:`bind` must tell about.

    FSDP1 sets these attributes, and nothing else does.
    """
    if getattr(parameter, "_is_flat_param", False):
        raise ValueError(f"{name} is a flat parameter of FSDP1: wrap the model with use_orig_params=True")
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is sharded by FSDP1, which does not tell its shape: after the model is wrapped, call "
            "sharded_shampoo4.integrations.fsdp.bind(optimizer, model)"
        )


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1, activation checkpointing and torch.compile put into it.

    ``module.``, which DDP and DeepSpeed put before all names, may be a part of the model as well: see
    :func:`plain_names` and :func:`names_in`.
    """
    return ".".join(part for part in name.split(".") if part not in _MARKS)


def plain_names(names: Sequence[str]) -> list[str]:
    """Names of an optimizer's parameters without what wrappers put into them.

    ``module.`` is taken from the front as long as all names begin with it: a wrapper puts it before all of them.

    Raises:
        ValueError: two names become equal.

    >>> plain_names(["module._orig_mod.0.weight", "module._orig_mod.module.bias"])
    ['0.weight', 'module.bias']
    """
    plain = [plain_name(name) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    seen: dict[str, str] = {}
    for name, found in zip(names, plain, strict=True):
        other = seen.setdefault(found, name)
        if other != name:
            raise ValueError(f"{other} and {name} are both named {found} without what wrappers put into names")
    return plain


def match_names(saved: Iterable[str], here: Iterable[str], complete: bool = True) -> dict[str, str]:
    """The name in ``here`` of every one in ``saved`` that is there, whatever wrappers either of them was named under.

    Equal names are matched first. Then names are compared as :func:`plain_names` gives them, and last without any
    ``module.`` in them, which appears inside a name where only a part of a model is wrapped.

    Args:
        saved: plain names or, in checkpoints of early versions, names as they were given.
        here: plain names.
        complete: all of ``here`` must be found too; otherwise, only all of ``saved``.

    Returns:
        Names in ``here`` by names in ``saved``. Where no way of reading names brings all of them together, only those
        that are equal as plain names.

    Raises:
        ValueError: two names become equal.
    """
    saved, here = list(saved), list(here)
    readings = (lambda names: names), plain_names, _without_module
    matches = []
    for read in readings:
        there = dict(zip(read(saved), saved, strict=True))
        own = dict(zip(read(here), here, strict=True))
        unique = len(there) == len(saved) and len(own) == len(here)
        if unique and there.keys() <= own.keys() and (not complete or len(there) == len(own)):
            return {there[name]: own[name] for name in there}
        matches.append({there[name]: own[name] for name in there.keys() & own.keys()})
    return matches[1]


def names_in(model: nn.Module) -> dict[Tensor, str]:
    """The plain name of every parameter and buffer in ``model``, wrapped or not; the first one of those it shares.

    Unlike names alone, a model tells which ``module.`` belongs to a wrapper.

    Raises:
        ValueError: two parameters have one name without what wrappers put into names.
    """
    found: dict[Tensor, str] = {}
    taken: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = _name_in(model, name)
        if taken.setdefault(plain, tensor) is not tensor:
            raise ValueError(f"two parameters of the model have the name {plain} without what wrappers put into names")
        found[tensor] = plain
    return found


def _name_in(model: nn.Module, name: str) -> str:
    """``name``, of a parameter in ``model``, without the parts that stand for wrappers."""
    module: Any = model
    parts = []
    for part in name.split("."):
        if part not in _MARKS and not (part == "module" and _is_wrapper(module)):
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def _is_wrapper(module: Any) -> bool:
    """Whether ``module`` keeps the model that it wraps as ``module``."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return isinstance(module, parallel) or hasattr(module, "basic_optimizer")


def _without_module(names: Sequence[str]) -> list[str]:
    return [".".join(part for part in plain_name(name).split(".") if part != "module") for name in names]


def refuse_own_states() -> None:
    """Raise RuntimeError if FSDP1 is asking for an optimizer's states in its own form, which cannot hold factors."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _STATES_OF_FSDP1:
            raise RuntimeError(
                "FSDP.optim_state_dict(), and get_optimizer_state_dict() and set_optimizer_state_dict() under FSDP1, "
                "cut every state as FSDP1 cuts its parameter, and so cannot hold the factors of Shampoo4: call "
                "optimizer.consolidate_state_dict() on every rank and save optimizer.state_dict(), or use "
                "sharded_shampoo4.checkpoint"
            )


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded by FSDP2 or HSDP."""
    return _as_dtensor(tensor) is not None


def shard_vector(vector: Tensor, parameter: Tensor) -> Tensor:
    """A ``vector`` that every rank has, as a DTensor on the mesh and with the placements of ``parameter``.

    Where ``parameter`` is no DTensor, the vector itself. It is copied, so that the rest of it can be freed.
    """
    like = _as_dtensor(parameter)
    if like is None:
        return vector
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, coordinate = like.device_mesh, like.device_mesh.get_coordinate()
    assert coordinate is not None
    start, size = 0, len(vector)
    placements = [Shard(0) if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    for ranks, position, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            offset, size = _chunk(size, ranks, position)
            start += offset
    local = vector[start : start + size].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=vector.shape, stride=(1,))


def process_group(
    parameters: Iterable[Tensor], chosen: dist.ProcessGroup | str | None = None, names: Iterable[str] = ()
) -> dist.ProcessGroup | None:
    """The ranks that hold ``parameters`` between them, or None if this rank holds them alone.

    The ``chosen`` ones (a group, or ``"alone"``); otherwise the default group, unless the parameters are DTensors on a
    mesh of some of the ranks only. ``names`` are for messages.

    Raises:
        ValueError: the parameters' meshes have different ranks, or a mesh of two or more dimensions has only some of
            the ranks (there is no group of just those).
    """
    if not dist.is_available() or not dist.is_initialized() or isinstance(chosen, str):
        return None
    if chosen is not None:
        return chosen if dist.get_world_size(chosen) > 1 else None
    meshes: dict[DeviceMesh, str] = {}  # with the name of their first parameter
    for mesh, name in itertools.zip_longest(map(_mesh, parameters), names):
        if mesh is not None:
            meshes.setdefault(mesh, name)
    by_ranks = {_ranks_of(mesh): mesh for mesh in meshes}
    if len(by_ranks) > 1:
        found = ", ".join(f"{mesh}{f' ({name}, ...)' if name else ''}" for mesh, name in meshes.items())
        raise ValueError(
            f"the parameters are on meshes of different ranks: {found}. That is expert or tensor parallelism: give the "
            "parameters of each mesh to a Shampoo4 of their own"
        )
    world = tuple(range(dist.get_world_size()))
    group = dist.group.WORLD
    for ranks, mesh in by_ranks.items():
        if ranks != world:
            group = _group_of(mesh)
    return group if group is not None and group.size() > 1 else None


def check_chosen(chosen: Any) -> None:
    """Raise TypeError or ValueError unless ``chosen`` can be an optimizer's ``process_group``."""
    if chosen is None or chosen == "alone":
        return
    if isinstance(chosen, str):
        raise ValueError(f"process_group must be None, 'alone' or a torch.distributed ProcessGroup, got {chosen!r}")
    if dist.is_available() and chosen is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group that process_group= was given: make the optimizer on the "
            "ranks of the group only"
        )
    if not dist.is_available() or not isinstance(chosen, dist.ProcessGroup):
        hint = "; of a DeviceMesh, give mesh.get_group()" if type(chosen).__name__ == "DeviceMesh" else ""
        raise TypeError(
            "process_group must be None, 'alone' or a torch.distributed ProcessGroup, not "
            f"{type(chosen).__name__}{hint}"
        )


def check_shared(name: str, parameter: Tensor, chosen: dist.ProcessGroup | str | None) -> None:
    """Raise ValueError if ``parameter`` is a DTensor on other ranks than the ``chosen`` process group."""
    dtensor = _as_dtensor(parameter)
    if chosen is None or dtensor is None:
        return
    ranks = _ranks_of(dtensor.device_mesh)
    if isinstance(chosen, str):
        if any(p.is_shard() and n > 1 for p, n in zip(dtensor.placements, dtensor.device_mesh.shape, strict=True)):
            raise ValueError(
                f"process_group={chosen!r}, but {name} is sharded over ranks {list(ranks)}: leave process_group out, "
                "the ranks of a mesh are found by themselves"
            )
        return
    members = tuple(sorted(dist.get_process_group_ranks(chosen)))
    if ranks != members:
        raise ValueError(
            f"process_group has ranks {list(members)}, but {name} is on a mesh of ranks {list(ranks)}: leave "
            "process_group out, or give a group of just these ranks"
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
    while not hasattr(optimizer, "_bind_locations") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "_bind_locations"):
        raise TypeError(f"bind needs a Shampoo4 optimizer, not {type(optimizer).__name__}")
    optimizer._bind_locations(_bound_locations(model, getattr(optimizer, "_process_group", None)))


# -- plain tensors and DTensors ----------------------------------------------------------------------------------------


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """``tensor`` if it is a DTensor. Their module takes a second to import, so it is only looked up."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def _whole(shape: torch.Size) -> Location:
    """The location of a parameter that every rank holds whole."""
    several = dist.is_available() and dist.is_initialized()
    return Location(shape, 0, shape.numel(), dist.get_rank() if several else 0)


def _locate_dtensor(name: str, parameter: DTensor) -> Location:
    from torch.distributed.tensor import Replicate, Shard

    mesh, shape = parameter.device_mesh, parameter.shape
    described = f"{name} of shape {tuple(shape)} has placements {tuple(parameter.placements)} on {mesh}"
    instead = (
        "tensor and expert parallelism and other dimensions than the first are not supported. Leave it to the base "
        "optimizer, in a param group with precondition=False (state_dict() holds it then, a portable checkpoint does "
        "not), or shard it by FSDP2 alone"
    )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"{described}, of which this rank is no part: make its optimizer on the ranks of the mesh only"
        )
    offsets = [0] * len(shape)
    sizes, largest = list(shape), list(shape)  # of this rank's box, and of rank 0's
    replica = 0
    for ranks, position, placement in zip(mesh.shape, coordinate, parameter.placements, strict=True):
        if type(placement) is Shard:  # a _StridedShard is a Shard in some versions of torch
            dim = placement.dim
            offset, sizes[dim] = _chunk(sizes[dim], ranks, position)
            offsets[dim] += offset
            largest[dim] = _chunk(largest[dim], ranks, 0)[1]
        elif type(placement) is Replicate:
            replica = replica * ranks + position
        else:
            raise ValueError(f"{described}: only Shard(0) and Replicate() are understood; {instead}")
    if not _is_interval(largest, shape):
        raise ValueError(f"{described}: a rank's part is not one interval of it, as it is with Shard(0); {instead}")
    start = sum(offset * math.prod(shape[dim + 1 :]) for dim, offset in enumerate(offsets))
    numel = math.prod(sizes)
    return interval(shape, start, start + numel, replica)


def interval(shape: torch.Size, start: int, stop: int, replica: int) -> Location:
    """A location whose empty interval is always (0, 0)."""
    return Location(shape, start, stop, replica) if stop > start else Location(shape, 0, 0, replica)


def _chunk(size: int, parts: int, position: int) -> tuple[int, int]:
    """Offset and size of one part of a dimension, cut as ``torch.chunk`` does; the last parts may be empty."""
    step = -(-size // parts)
    offset = min(position * step, size)
    return offset, min(step, size - offset)


def _is_interval(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box of ``sizes`` is contiguous in a row-major tensor of ``shape``.

    It is if, after the first dimension that is longer than 1, every dimension is whole.

    >>> _is_interval((2, 5, 3), (9, 5, 3)), _is_interval((1, 2, 3), (1, 5, 3)), _is_interval((9, 2), (9, 4))
    (True, True, False)
    """
    first = next((dim for dim, size in enumerate(sizes) if size > 1), len(sizes))
    return list(sizes[first + 1 :]) == list(shape[first + 1 :])


def _current_device(kind: str) -> torch.device:
    """This process's device of a ``kind`` such as "cuda"."""
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _mesh(parameter: Tensor) -> DeviceMesh | None:
    dtensor = _as_dtensor(parameter)
    return None if dtensor is None else dtensor.device_mesh


def _ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of a mesh with at most one dimension longer than 1; None if it has a single rank."""
    longer = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(longer) > 1:
        raise ValueError(
            f"{mesh} has only some of the {dist.get_world_size()} ranks, and more than one dimension: give "
            "process_group=, a group of just its ranks"
        )
    return mesh.get_group(longer[0]) if longer else None


# -- FSDP1 -------------------------------------------------------------------------------------------------------------


def _bound_locations(model: nn.Module, chosen: dist.ProcessGroup | str | None) -> dict[Tensor, Location]:
    """The locations of all parameters that FSDP1 shards in ``model``, among the ``chosen`` ranks or all."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = FullyShardedDataParallel.fsdp_modules(model)
    if not units:
        raise ValueError("the model has no FullyShardedDataParallel (FSDP1) module: only under FSDP1 is bind needed")
    locations: dict[Tensor, Location] = {}
    for unit in units:
        if unit._handle is not None:  # None: it has no parameters of its own
            locations.update(_unit_locations(unit, chosen))
    return locations


def _unit_locations(unit: Any, chosen: dist.ProcessGroup | str | None) -> Iterator[tuple[Tensor, Location]]:
    """The parameters that one FSDP1 module shards, and their locations."""
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
        yield parameter, replace(interval(torch.Size(shape), start, stop, replica), device=computes)


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
