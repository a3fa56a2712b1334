"""Bytes of weights, gradients and optimizer states on each rank, for the optimizers and hosts of the memory report.

Weights, gradients and states of no stated type are float32. Optimizer states, in bytes:

=====================  ===============================================================================================
AdamW                  8 for each element, and a step count of 4 for each tensor
8-bit AdamW            as in bitsandbytes: 2 for each element and two float32 scales for each 256 elements; smaller
                       tensors than 4096 elements as under AdamW, without the count; two code books of 1 KiB
Muon                   a momentum of 4 for each element of a matrix; AdamW for the others, see :func:`takes_muon`
Shampoo, 32 bits       this library with ``bits=32``: AdamW's states, and for each block of m x n four float32 squares
                       (L and R of orders m and n, and their inverse roots) and 8 bytes a factor that count failures.
                       Meta's Distributed Shampoo keeps the same squares with ``use_symmetric_packing=False``
Shampoo, packed        a triangle of n (n + 1) / 2 elements for each square, Meta's default
Shampoo4               this library's defaults: for each block, on its rank, two moments in bfloat16, and the eigenbases
                       of L and R in 8 bits; AdamW's states for parameters without blocks
Shampoo4, compact      the same with momentum in 8 bits, means of rows and columns of the second moment, 4-bit bases
=====================  ===============================================================================================

Elementwise states are sharded as the weights are: whole under DDP and ZeRO 0, rows of each parameter under FSDP2 and
HSDP, padded flat partitions under ZeRO 1 to 3, one for each parameter group (Muon has two). The moments of a block are
on the block's rank instead.
The report assumes that 8-bit AdamW quantizes each rank's shards, and that both 32-bit Shampoos give each block to one
rank, as this library does. Meta's own ways under FSDP2 keep more on the fullest rank, and factors of 1-D parameters,
which are not counted.

Activations, gathered parameters, buckets and other buffers of the host, and scratch memory of a step are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.blocks import blocks_of, orders_of
from torch import Size

from sharded_shampoo4 import MemoryEstimate, estimate_memory

from .models import Shapes

HOSTS = ("none", "ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")

OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "muon": "Muon",
    "shampoo32": "Shampoo, 32 bits",
    "shampoo32_packed": "Shampoo, packed",
    "shampoo4": "Shampoo4",
    "shampoo4_compact": "Shampoo4, compact",
}
_FORMER: dict[str, Any] = {"max_aspect": 0, "batch_dims": 0}  # what others do: each parameter is one matrix
_OPTIONS: dict[str, dict[str, Any]] = {
    "shampoo32": {"method": "shampoo", "bits": 32, **_FORMER},
    "shampoo4": {},
    "shampoo4_compact": {"preset": "compact"},
}

_FLOAT = 4  # bytes
_BLOCK, _SMALLEST, _CODE_BOOKS = 256, 4096, 2 * 256 * _FLOAT  # of bitsandbytes' 8-bit optimizers

Sizes = list[list[int]]  # by rank: the elements of each tensor that the rank's optimizer is given


@dataclass(frozen=True)
class Layout:
    """A host on a number of ranks; under HSDP with ``replicas`` complete copies of the model."""

    host: str
    world_size: int
    replicas: int | None = None

    def __str__(self) -> str:
        return f"{self.host}, {self.replicas} copies" if self.replicas else self.host


@dataclass(frozen=True)
class Footprint:
    """Bytes that a rank keeps. All ranks have equal weights and gradients; ``states`` are the fullest rank's."""

    layout: Layout
    weights: int
    gradients: int
    states: dict[str, int]

    def total(self, optimizer: str) -> int:
        """Bytes on the fullest rank."""
        return self.weights + self.gradients + self.states[optimizer]


def footprint(shapes: Shapes, layout: Layout, optimizers: Iterable[str] = OPTIMIZERS) -> Footprint:
    """Count the bytes of a model under a host, with the states of each of ``optimizers``."""
    states = {optimizer: max(state_bytes(shapes, layout, optimizer)) for optimizer in optimizers}
    return Footprint(layout, weight_bytes(shapes, layout), gradient_bytes(shapes, layout), states)


def weight_bytes(shapes: Shapes, layout: Layout) -> int:
    """Count the bytes of float32 weights on every rank.

    FSDP2 pads each shard to the size of the first rank's. ZeRO 1 and 2 keep all weights in one padded vector, and the
    rank's partition a second time for the optimizer, even where the weights are float32 already.
    """
    held = max(map(sum, local_sizes(shapes, layout)))
    return _FLOAT * held * (layout.world_size + 1 if layout.host in ("zero1", "zero2") else 1)


def gradient_bytes(shapes: Shapes, layout: Layout) -> int:
    """Count the bytes of float32 gradients on every rank after the backward pass: whole ones, or those of shards."""
    kept = Layout("ddp", layout.world_size) if layout.host == "zero1" else layout
    return _FLOAT * max(map(sum, local_sizes(shapes, kept)))


def local_sizes(shapes: Shapes, layout: Layout) -> Sizes:
    """Count the elements of each rank's tensors: shards of parameters, or one padded partition under ZeRO 1 to 3."""
    numels, ranks = [shape.numel() for shape in shapes.values()], layout.world_size
    if layout.host in ("none", "ddp", "zero0"):
        return [numels] * ranks
    if layout.host in ("zero1", "zero2"):
        return [[-(-sum(numels) // (2 * ranks)) * 2]] * ranks
    if layout.host == "zero3":
        return [[sum(-(-numel // ranks) for numel in numels)]] * ranks
    parts = ranks // (layout.replicas or 1)
    return [[_rows(shape, part, parts) for shape in shapes.values()] for part in range(parts)] * (ranks // parts)


def _rows(shape: Size, part: int, parts: int) -> int:
    """Count the elements of the rows that ``torch.chunk`` gives to one of ``parts``."""
    each = -(-shape[0] // parts)
    return max(0, min(shape[0] - part * each, each)) * (shape.numel() // shape[0])


# -- optimizer states, by rank -----------------------------------------------------------------------------------------


def state_bytes(shapes: Shapes, layout: Layout, optimizer: str) -> list[int]:
    """Count the bytes of an optimizer's states on each rank, for a key of ``OPTIMIZERS``."""
    if optimizer == "adamw":
        return adamw(local_sizes(shapes, layout))
    if optimizer == "adamw8bit":
        return adamw_8bit(local_sizes(shapes, layout))
    if optimizer == "muon":
        return muon(shapes, layout)
    if optimizer == "shampoo32_packed":
        return packed(shapes, layout)
    return shampoo(shapes, layout, optimizer).total


def adamw(sizes: Sizes) -> list[int]:
    """Count AdamW's two moments and step counts."""
    return [sum(2 * _FLOAT * size for size in local) + _FLOAT * len(local) for local in sizes]


def adamw_8bit(sizes: Sizes) -> list[int]:
    """Count the states of bitsandbytes' ``AdamW8bit``, whose step counts are plain integers."""

    def bytes_of(size: int) -> int:
        return 2 * (size + _FLOAT * -(-size // _BLOCK) if size >= _SMALLEST else _FLOAT * size)

    return [sum(map(bytes_of, local)) + _CODE_BOOKS * any(size >= _SMALLEST for size in local) for local in sizes]


def takes_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether Muon trains a parameter: a 2-D weight of a hidden layer, not an embedding or output layer."""
    others = ("embed", "relative_position_bias", "classifier", "lm_head")
    return len(shape) == 2 and not any(part in name for part in others)


def muon(shapes: Shapes, layout: Layout) -> list[int]:
    """Count Muon's momentum, and AdamW's states of the other parameters."""
    hidden = {name: shape for name, shape in shapes.items() if takes_muon(name, shape)}
    others = {name: shape for name, shape in shapes.items() if name not in hidden}
    momentum = [_FLOAT * sum(local) for local in local_sizes(hidden, layout)]
    rest = adamw(local_sizes(others, layout)) if others else [0] * layout.world_size
    return [mine + more for mine, more in zip(momentum, rest, strict=True)]


def shampoo(shapes: Shapes, layout: Layout, optimizer: str) -> MemoryEstimate:
    """Estimate the library's own states. Hosts that shard alike are planned once."""
    host = {"zero0": "ddp", "zero2": "zero1"}.get(layout.host, layout.host)
    return _estimate(tuple(shapes.items()), Layout(host, layout.world_size, layout.replicas), optimizer)


@functools.lru_cache(maxsize=64)
def _estimate(shapes: tuple[tuple[str, Size], ...], layout: Layout, optimizer: str) -> MemoryEstimate:
    options = _OPTIONS[optimizer]
    return estimate_memory(shapes, layout.world_size, host=layout.host, replicas=layout.replicas, **options)


def packed(shapes: Shapes, layout: Layout) -> list[int]:
    """Count AdamW's states and packed factors. Each rank has the same share of packed factors as of square ones."""
    whole = sum(
        count * 2 * _FLOAT * triangle(order)
        for order, count in orders_of(blocks_of(shapes.values(), **_FORMER)).items()
    )
    square = shampoo(shapes, layout, "shampoo32")
    every = sum(square.preconditioner)
    shares = [round(whole * mine / every) if every else 0 for mine in square.preconditioner]
    return [base + share for base, share in zip(square.base, shares, strict=True)]


def triangle(order: int) -> int:
    """Count the elements on and above the diagonal of a square matrix."""
    return order * (order + 1) // 2
