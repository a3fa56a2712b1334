"""Which elements of a parameter a rank holds of a DTensor: those of a box, and how its dimensions are cut.

FSDP2 and HSDP cut the first dimension of a parameter, tensor and expert parallelism any. Together they cut at most two
in nearly all programs, and then a rank's part is a :class:`.planning.shards.Shard`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .planning.shards import Shard, make_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def locate_dtensor(name: str, parameter: DTensor) -> Shard:
    """Return the shard of a ``parameter`` that this rank holds. Its replica is the first rank of that replica.

    Whether it is a plain interval follows from shape, mesh and placements alone, the same on every rank.

    Args:
        name: of the parameter, for messages.
        parameter: sharded in whatever way.

    Raises:
        ValueError: a rank's part is no shard, or there is no telling which elements it has.
    """
    mesh, shape, placements = parameter.device_mesh, parameter.shape, parameter.placements
    described = f"{name} of shape {tuple(shape)} has placements {tuple(placements)} on {mesh}"
    instead = (
        "leave it to the base optimizer, in a param group with precondition=False (state_dict() holds it then, a "
        "portable checkpoint does not)"
    )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"{described}, of which this rank is no part: make its optimizer on the ranks of the mesh only"
        )
    cuts = _cuts(placements, mesh.shape, len(shape))
    if cuts is None:
        raise ValueError(
            f"{described}: only Shard and Replicate are understood, and the _StridedShard that FSDP2 makes of a "
            f"dimension that is sharded already; {instead}"
        )
    box = [_part(size, mesh.shape, own, coordinate) for size, own in zip(shape, cuts, strict=True)]
    largest = [_part(size, mesh.shape, own, [0] * mesh.ndim) for size, own in zip(shape, cuts, strict=True)]
    first = [
        0 if sharded_dimension(p) is not None else position for p, position in zip(placements, coordinate, strict=True)
    ]
    found = _shard(shape, box, [size for _, size in largest], int(mesh.mesh[tuple(first)]))
    if found is None:
        raise ValueError(
            f"{described}: a rank's part is not a number of equal intervals of it, equally far apart, as it is where "
            f"no more than two dimensions are cut, the first and another one; {instead}"
        )
    return found


def sharded_dimension(placement: Placement) -> int | None:
    """Return the dimension that a placement cuts, in whatever way; None if it cuts none."""
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor.placement_types import _StridedShard

    return placement.dim if isinstance(placement, (Sharded, _StridedShard)) else None


def chunk(size: int, parts: int, position: int) -> tuple[int, int]:
    """Offset and size of one part of a dimension, cut as ``torch.chunk`` does; the last parts may be empty."""
    step = -(-size // parts)
    offset = min(position * step, size)
    return offset, min(step, size - offset)


def _cuts(placements: Sequence[Placement], sizes: Sequence[int], dimensions: int) -> list[list[int]] | None:
    """By dimensions of a tensor, those of the mesh of ``sizes`` that cut it, in their order; None if not understood."""
    cuts: list[list[int]] = [[] for _ in range(dimensions)]
    # From the last one: a _StridedShard cuts what all those behind it leave, any other before them.
    for number, placement in reversed(list(enumerate(placements))):
        dim = sharded_dimension(placement)
        if dim is None:
            if not placement.is_replicate():
                return None
            continue
        factor = getattr(placement, "split_factor", 1)
        if factor == 1:
            cuts[dim].insert(0, number)
        elif factor == math.prod(sizes[behind] for behind in cuts[dim]):
            cuts[dim].append(number)
        else:
            return None
    return cuts


def _part(size: int, mesh: Sequence[int], cuts: Sequence[int], coordinate: Sequence[int]) -> tuple[int, int]:
    """Offset and size of the part of a dimension at a ``coordinate`` of the mesh, some dimensions of which cut it."""
    offset = 0
    for number in cuts:
        inside, size = chunk(size, mesh[number], coordinate[number])
        offset += inside
    return offset, size


def _shard(shape: Sequence[int], box: Sequence[tuple[int, int]], largest: Sequence[int], replica: int) -> Shard | None:
    """The elements of a ``box``, given by the offset and size of each dimension; None if they are no shard.

    ``largest`` are the sizes of the largest box of any rank.
    """
    start = sum(offset * math.prod(shape[dim + 1 :]) for dim, (offset, _) in enumerate(box))
    sizes = [size for _, size in box]
    if _is_interval(largest, shape):
        return make_shard(start, start + math.prod(sizes), replica)
    last = max(dim for dim, size in enumerate(largest) if size < shape[dim])
    if not _is_interval(largest[:last], shape[:last]):
        return None
    inner = math.prod(shape[last + 1 :])
    return make_shard(start, start + sizes[last] * inner, replica, math.prod(sizes[:last]), shape[last] * inner)


def _is_interval(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box of ``sizes`` is contiguous in a row-major tensor of ``shape``.

    It is if, after the first dimension that is longer than 1, every dimension is whole.

    >>> _is_interval((2, 5, 3), (9, 5, 3)), _is_interval((1, 2, 3), (1, 5, 3)), _is_interval((9, 2), (9, 4))
    (True, True, False)
    """
    first = next((dim for dim, size in enumerate(sizes) if size > 1), len(sizes))
    return list(sizes[first + 1 :]) == list(shape[first + 1 :])
