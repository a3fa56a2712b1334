"""Where plain tensors and DTensors lie: which elements of a parameter this rank holds, and with which other ranks.

A rank holds one contiguous interval of every flattened (row-major) parameter, possibly an empty one: all of it in one
process and under DDP, whole rows of a DTensor with placement Shard(0) (FSDP2), or (Replicate(), Shard(0)) (HSDP).
DDP and HSDP keep several complete copies of a parameter, its replicas.
A :class:`.hosts.Host` tells the intervals of other frameworks.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .planning.blocks import Shard, make_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def locate(name: str, parameter: Tensor) -> Shard:
    """Return the shard of ``parameter``, a plain tensor or a DTensor, that this rank holds.

    Args:
        name: of the parameter, for messages.
        parameter: as the optimizer has it.

    Raises:
        ValueError: some rank's elements are not one interval. Placements are refused on every rank alike, whatever its
            own part.
    """
    dtensor = _as_dtensor(parameter)
    shard = _whole(parameter.shape) if dtensor is None else _locate_dtensor(name, dtensor)
    check_size(name, parameter, shard, parameter.shape)
    return shard


def check_size(name: str, parameter: Tensor, shard: Shard, shape: torch.Size) -> None:
    """Raise ValueError unless ``parameter``, of whole ``shape``, has as many elements on this rank as ``shard``."""
    held = local_tensor(parameter).numel()
    if held != shard.length:
        raise ValueError(
            f"{name} has {held} elements on this rank where elements {shard.start} to {shard.stop} of "
            f"{tuple(shape)} were expected: its shards have changed"
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor behind a DTensor, in the same storage; any other tensor itself."""
    dtensor = _as_dtensor(tensor)
    return tensor if dtensor is None else dtensor._local_tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded by FSDP2 or HSDP."""
    return _as_dtensor(tensor) is not None


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


def shard_vector(vector: Tensor, parameter: Tensor) -> Tensor:
    """A ``vector`` that every rank has, as a DTensor on the mesh and with the placements of ``parameter``.

    Where ``parameter`` is no DTensor, the vector itself. It is copied, so that the rest of it can be freed.
    """
    like = _as_dtensor(parameter)
    if like is None:
        return vector
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    mesh, coordinate = like.device_mesh, like.device_mesh.get_coordinate()
    assert coordinate is not None
    start, size = 0, len(vector)
    placements = [Sharded(0) if isinstance(placement, Sharded) else Replicate() for placement in like.placements]
    for ranks, position, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if isinstance(placement, Sharded):
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


def check_process_group(chosen: Any) -> None:
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


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """``tensor`` if it is a DTensor. Their module takes a second to import, so it is only looked up."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def _whole(shape: torch.Size) -> Shard:
    """The shard of a parameter that every rank holds whole."""
    several = dist.is_available() and dist.is_initialized()
    return Shard(0, shape.numel(), dist.get_rank() if several else 0)


def _locate_dtensor(name: str, parameter: DTensor) -> Shard:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded

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
        if type(placement) is Sharded:  # a _StridedShard is a Shard in some versions of torch
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
    return make_shard(start, start + numel, replica)


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
