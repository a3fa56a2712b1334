"""Exact bytes of the optimizer's states: measured from tensors, or from shapes before training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Base
from .base_options import refuse_ignored
from .comm.exchange import wire_dtype
from .numerics.matrix import Matrix
from .options import OPTION_NAMES, PreconditionerOptions
from .planning.plan import Plan
from .planning.schedule import stagger
from .planning.shards import Shard
from .planning.views import matrix_view
from .presets import apply_preset
from .report import format_bytes, table

_HOSTS = ("none", "ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each rank, one entry per rank.

    Attributes:
        preconditioner, base: what :meth:`Shampoo4.state_bytes` will measure once every parameter has had a gradient.
        traffic: what the rank's optimizer sends to other ranks in an ordinary step: gradients to the owners of blocks
            and directions back, every parameter having a gradient and being past its first root step. Not counted
            are the sum of the grafting norms (16 bytes a block, in one all-reduce), the flags that the ranks compare
            on the host, and all that the host itself sends.
    """

    preconditioner: list[int]
    base: list[int]
    traffic: list[int]

    @property
    def total(self) -> list[int]:
        """Bytes of all states on each rank."""
        return [preconditioner + base for preconditioner, base in zip(self.preconditioner, self.base, strict=True)]

    def __str__(self) -> str:
        header = ("rank", "preconditioner", "base", "total", "sent per step")
        columns = zip(self.preconditioner, self.base, self.total, self.traffic, strict=True)
        return table([header, *((str(rank), *map(format_bytes, row)) for rank, row in enumerate(columns))])


def estimate_memory(
    named_shapes: Mapping[str, Any] | Iterable[tuple[str, Any]],
    world_size: int = 1,
    *,
    host: str = "fsdp2",
    replicas: int | None = None,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-3,
    base: str | type[torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    **shampoo4_options: Any,
) -> MemoryEstimate:
    """Compute the bytes of the optimizer's states on every rank, and of what it sends, from shapes only.

    Args:
        named_shapes: names and shapes (or tensors, whose shapes are taken) of the parameters that are trained, in the
            order in which the optimizer is given them, such as ``model.named_parameters()``.
        world_size: number of ranks.
        host: what shards the parameters: ``"none"`` (one process), ``"ddp"``, ``"fsdp2"``, ``"hsdp"``, or DeepSpeed's
            ``"zero0"`` to ``"zero3"``, there with all parameters in one group and, at stage 3, one sub-group.
        replicas: under ``"hsdp"``, the number of complete copies of the model: the first size of its mesh.
        dtype: type of the parameters, which is that of most base optimizers' states. DeepSpeed's are in float32.
        lr, base, weight_decay, ``**shampoo4_options``: as :class:`Shampoo4` takes them.

    Raises:
        TypeError, ValueError: as :class:`Shampoo4` does; a host that is not known, or cannot have so many ranks.
    """
    copies = copies_of(host, world_size, replicas)
    dtype = torch.float32 if host.startswith("zero") else dtype
    given = apply_preset(shampoo4_options)
    options = PreconditionerOptions.of_call(given)
    own = (*OPTION_NAMES, "total_steps", "process_group")
    made = Base(base, lr, weight_decay, {name: value for name, value in given.items() if name not in own})
    refuse_ignored(options, made.arguments)
    if options.precondition and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, and Shampoo4 preconditions real numbers only: give precondition=False")
    computed = torch.promote_types(dtype, torch.float32)

    items = list(named_shapes.items() if isinstance(named_shapes, Mapping) else named_shapes)
    shapes = [x.shape if isinstance(x, Tensor) else torch.Size(x) for _, x in items]
    sharding = shard_all(host, shapes, world_size, copies)
    views = [matrix_view(name, shape, options) for (name, _), shape in zip(items, shapes, strict=True)]
    schedule = iter(stagger([(view, options) for view in views if view]))
    matrices, planned = [], []
    for (name, _), shape, view, shards in zip(items, shapes, views, sharding.shards, strict=True):
        if view:
            matrix = Matrix.of(name, shape, options, torch.device("meta"), computed, next(schedule))
            assert matrix is not None
            matrices.append(matrix)
            planned.append(matrix.planned(shards))

    plan = Plan(planned, world_size)
    preconditioner = [0] * world_size
    for (index, block), owner in zip(plan.blocks, plan.owners, strict=True):
        preconditioner[owner] += matrices[index].block_bytes(block)
    alone = [view is not None and options.method == "soap" for view in views]
    base_bytes = made.bytes_on_ranks(dtype, base_sizes(host, sharding, alone))
    wire = wire_dtype([computed], [options.exchange_dtype == "bfloat16"])
    return MemoryEstimate(preconditioner, base_bytes, [wire.itemsize * count for count in plan.elements_sent()])


def copies_of(host: str, world_size: int, replicas: int | None) -> int:
    """Return how many complete copies of the model a host keeps on ``world_size`` ranks."""
    if host not in _HOSTS:
        raise ValueError(f"host must be one of {', '.join(map(repr, _HOSTS))}, got {host!r}")
    for name, value in (("world_size", world_size), ("replicas", 1 if replicas is None else replicas)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if host == "none" and world_size != 1:
        raise ValueError(f"host='none' is a single process: world_size must be 1, got {world_size}")
    if (host == "hsdp") != (replicas is not None):
        raise ValueError(f"replicas must be given under host='hsdp', and there only: got {replicas!r} with {host!r}")
    if replicas is None:
        return world_size if host in ("ddp", "zero0") else 1
    if world_size % replicas:
        raise ValueError(f"world_size must be a multiple of replicas, got {world_size} and {replicas}")
    return replicas


class Sharding(NamedTuple):
    """Every rank's shard of every parameter; and, by rank, the elements of each tensor that its optimizer steps on."""

    shards: list[tuple[Shard, ...]]
    sizes: list[list[int]]


def shard_all(host: str, shapes: list[torch.Size], world_size: int, copies: int) -> Sharding:
    """Spread parameters of these shapes as a host does; ``copies`` as :func:`copies_of` tells it."""
    if host in ("zero1", "zero2"):
        return _shard_in_a_row(shapes, world_size)
    if host == "zero3":
        parts = [-(-shape.numel() // world_size) for shape in shapes]
        shards = [_cut(shape.numel(), 0, part, world_size) for shape, part in zip(shapes, parts, strict=True)]
        return Sharding(shards, [[sum(parts)]] * world_size)
    shards = [_shard_rows(shape, copies, world_size // copies) for shape in shapes]
    # A rank with an empty shard keeps the counts of steps all the same.
    sizes = [[shard[rank].stop - shard[rank].start for shard in shards] for rank in range(world_size)]
    return Sharding(shards, sizes)


def base_sizes(host: str, sharding: Sharding, alone: Sequence[bool]) -> list[list[int]]:
    """By rank, the elements of each tensor that the base steps on, where some parameters go ``alone`` (soap)."""
    if not any(alone):
        return sharding.sizes
    left = [shards for shards, without in zip(sharding.shards, alone, strict=True) if not without]
    lengths = [[shards[rank].length for shards in left] for rank in range(len(sharding.sizes))]
    if host in ("zero1", "zero2", "zero3"):
        return [[sum(own)] if sum(own) else [] for own in lengths]
    return lengths


def _shard_in_a_row(shapes: list[torch.Size], world_size: int) -> Sharding:
    """ZeRO 1 and 2: all parameters one after the other, padded to a multiple of twice the ranks, in equal parts."""
    ends = list(itertools.accumulate(shape.numel() for shape in shapes))
    part = -(-(ends[-1] if ends else 0) // (2 * world_size)) * 2
    shards = [
        _cut(shape.numel(), end - shape.numel(), part, world_size) for shape, end in zip(shapes, ends, strict=True)
    ]
    return Sharding(shards, [[part]] * world_size)


def _cut(numel: int, begin: int, part: int, world_size: int) -> tuple[Shard, ...]:
    """The intervals of a parameter, which begins at ``begin``, in parts of equal size."""
    edges = [min(max(rank * part - begin, 0), numel) for rank in range(world_size + 1)]
    return tuple(Shard(start, stop) if start < stop else Shard(0, 0) for start, stop in itertools.pairwise(edges))


def _shard_rows(shape: torch.Size, copies: int, parts: int) -> tuple[Shard, ...]:
    """Every rank's shard: in each of the copies, the first dimension is cut into ``parts`` as torch.chunk cuts it."""
    length = shape[0] if shape else 1
    step = -(-length // parts)
    edges = [min(part * step, length) * (shape.numel() // max(length, 1)) for part in range(parts + 1)]
    whole = [(start, stop) if start < stop else (0, 0) for start, stop in itertools.pairwise(edges)]
    return tuple(Shard(start, stop, replica) for replica in range(copies) for start, stop in whole)
