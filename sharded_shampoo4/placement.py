"""Where plain tensors and DTensors lie: which elements of a parameter this rank holds, and with which other ranks.

Of every flattened (row-major) parameter a rank holds an interval, possibly an empty one: all of it in one process and
under DDP, whole rows of a DTensor with placement Shard(0) (FSDP2), or (Replicate(), Shard(0)) (HSDP). Where tensor or
expert parallelism cuts another dimension, it holds several equal intervals (``layout.py``).
DDP and HSDP keep several complete copies of a parameter, its replicas. So does a larger mesh of a parameter that is on
a part of that mesh, such as FSDP2's, only: each other part has a copy.
A :class:`.hosts.Host` tells the intervals of other frameworks.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import chunk, locate_dtensor, sharded_dimension
from .planning.shards import Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def locate(name: str, parameter: Tensor) -> Shard:
    """Return the shard of ``parameter``, a plain tensor or a DTensor, that this rank holds.

    Args:
        name: of the parameter, for messages.
        parameter: as the optimizer has it.

    Raises:
        ValueError: some rank's elements are no shard. Placements are refused on every rank alike, whatever its own
            part.
    """
    dtensor = _as_dtensor(parameter)
    shard = _whole(parameter.shape) if dtensor is None else locate_dtensor(name, dtensor)
    check_size(name, parameter, shard, parameter.shape)
    return shard


def check_size(name: str, parameter: Tensor, shard: Shard, shape: torch.Size) -> None:
    """Raise ValueError unless ``parameter``, of whole ``shape``, has as many elements on this rank as ``shard``."""
    held = local_tensor(parameter).numel()
    if held != shard.length:
        again = f", {shard.repeats} times, each {shard.stride} on," if shard.stride else ""
        raise ValueError(
            f"{name} has {held} elements on this rank where elements {shard.start} to {shard.stop} of "
            f"{tuple(shape)}{again} were expected: its shards have changed"
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor behind a DTensor, in the same storage; any other tensor itself."""
    dtensor = _as_dtensor(tensor)
    return tensor if dtensor is None else dtensor._local_tensor


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What :func:`local_tensor` gives for each of many, in a third of the time."""
    kind = dtensor_class()
    return [tensor._local_tensor if isinstance(tensor, kind) else tensor for tensor in tensors]


def reading_attributes() -> contextlib.AbstractContextManager[None]:
    """Read attributes of many DTensors, such as their types and gradients, in half the time; for nothing else.

    torch otherwise looks each time whether ``__torch_function__`` has an answer, which that of DTensors never has.
    """
    return torch._C.DisableTorchFunctionSubclass()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded by FSDP2 or HSDP."""
    return _as_dtensor(tensor) is not None


def placements_of(tensor: Tensor) -> tuple[Placement, ...] | None:
    """How a DTensor is placed on its mesh; None for any other tensor."""
    dtensor = _as_dtensor(tensor)
    return None if dtensor is None else dtensor.placements


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
    """A ``vector`` that every rank has, as a DTensor on the mesh of ``parameter``, cut wherever that is cut.

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
    sharded = [sharded_dimension(placement) is not None for placement in like.placements]
    for ranks, position, cuts in zip(mesh.shape, coordinate, sharded, strict=True):
        if cuts:
            offset, size = chunk(size, ranks, position)
            start += offset
    local = vector[start : start + size].clone()
    placements = [Sharded(0) if cuts else Replicate() for cuts in sharded]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=vector.shape, stride=(1,))


def process_group(
    parameters: Iterable[Tensor], chosen: dist.ProcessGroup | str | None = None, names: Iterable[str] = ()
) -> dist.ProcessGroup | None:
    """The ranks that hold ``parameters`` between them, or None if this rank holds them alone.

    The ``chosen`` ones (a group, or ``"alone"``); otherwise the default group, unless the parameters are DTensors on a
    mesh of some of the ranks only. Parameters may be on parts of the mesh that others are on, as those are that tensor
    parallelism leaves to FSDP2: other parts have copies. ``names`` are for messages.

    Raises:
        ValueError: no mesh has the ranks of all others, or a mesh of two or more dimensions has only some of the ranks
            (and nobody has made a group of just those).
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
    largest = max(by_ranks, key=len, default=())
    if not all(set(ranks) <= set(largest) for ranks in by_ranks):
        found = ", ".join(f"{mesh}{f' ({name}, ...)' if name else ''}" for mesh, name in meshes.items())
        raise ValueError(
            f"the parameters are on meshes of different ranks: {found}, and none has the ranks of all others: give the "
            "parameters of each mesh to a Shampoo4 of their own"
        )
    group = dist.group.WORLD
    if largest and largest != tuple(range(dist.get_world_size())):
        group = _group_of(by_ranks[largest])
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
    """Raise ValueError if ``parameter`` is a DTensor on other ranks than those of the ``chosen`` process group."""
    dtensor = _as_dtensor(parameter)
    if chosen is None or dtensor is None:
        return
    members = _ranks_of(dtensor.device_mesh)
    if isinstance(chosen, str):
        pairs = zip(dtensor.placements, dtensor.device_mesh.shape, strict=True)
        if any(sharded_dimension(placement) is not None and ranks > 1 for placement, ranks in pairs):
            raise ValueError(
                f"process_group={chosen!r}, but {name} is sharded over ranks {list(members)}: leave process_group out, "
                "the ranks of a mesh are found by themselves"
            )
        return
    given = sorted(dist.get_process_group_ranks(chosen))
    if not set(members) <= set(given):
        raise ValueError(
            f"process_group has ranks {given}, but {name} is on a mesh of ranks {list(members)}: leave process_group "
            "out, or give a group that has all of these"
        )


def dtensor_class() -> type[DTensor] | tuple[()]:
    """The class of DTensors, for ``isinstance``. Its module takes a second to import, so it is only looked up."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """``tensor`` if it is a DTensor."""
    return tensor if isinstance(tensor, dtensor_class()) else None


def _whole(shape: torch.Size) -> Shard:
    """The shard of a parameter that every rank holds whole."""
    several = dist.is_available() and dist.is_initialized()
    return Shard(0, shape.numel(), dist.get_rank() if several else 0)


def _current_device(kind: str) -> torch.device:
    """This process's device of a ``kind`` such as "cuda"."""
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _mesh(parameter: Tensor) -> DeviceMesh | None:
    dtensor = _as_dtensor(parameter)
    return None if dtensor is None else dtensor.device_mesh


def _ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of a mesh with some of the ranks; None if it has a single one.

    A mesh with several dimensions longer than 1 has one if the program has flattened it.
    """
    longer = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(longer) < 2:
        return mesh.get_group(longer[0]) if longer else None
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh  # not in every version of torch
    for flat in getattr(root, "_flatten_mapping", {}).values():
        if _ranks_of(flat) == _ranks_of(mesh):
            group: dist.ProcessGroup = flat.get_group()
            return group
    raise ValueError(
        f"{mesh} has only some of the {dist.get_world_size()} ranks, and more than one dimension: give "
        "process_group=, a group of just its ranks"
    )
