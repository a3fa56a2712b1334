"""What each rank keeps of weights, gradients and optimizer states, for every optimizer and host of the memory report.

Optimizer states, in bytes; all weights, gradients and unquantised states are float32:

=====================  ===============================================================================================
AdamW                  8 an element, and a step count of 4 for each tensor that it is given
8-bit AdamW            as bitsandbytes keeps them: 2 an element and two float32 scales for each 256 of them; tensors of
                       less than 4096 elements as AdamW's, without the count; two code books of 1 KiB for all tensors
Muon                   a momentum of 4 an element for matrices; AdamW for all else, see :func:`takes_muon`
Shampoo, 32 bits       AdamW's, and for each block of m x n four float32 squares: L and R of orders m and n, and their
                       inverse roots. This is what Meta's Distributed Shampoo keeps of matrices with
                       ``use_symmetric_packing=False`` and the same blocks, and this library with ``bits=32``,
                       but for 8 bytes a factor in which it counts failures
Shampoo, packed        the same with a triangle, n (n + 1) / 2 elements, for each square, Meta's default
Shampoo4               AdamW's, and the library's 4-bit factors
=====================  ===============================================================================================

Where they lie. Elementwise states follow the weights: whole under DDP and ZeRO 0; under FSDP2 and HSDP the rank's rows
of each parameter; under ZeRO 1 to 3 the rank's flat partition, padded, one for each parameter group (Muon has two).
8-bit AdamW is assumed to quantise what the rank holds: its shard of each parameter, or its partition. Both forms of
32-bit Shampoo are assumed to be spread as this library spreads its blocks, one owner for each; Meta's own ways under
FSDP2 keep more on the fullest rank. The preconditioners that it keeps for 1-D parameters are not counted.

Not counted: activations, gathered parameters, buckets and other buffers of the host (DDP's buckets are as large as the
gradients), and what a step has in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memory_models import Shapes

from sharded_shampoo4.factors import factor_bytes
from sharded_shampoo4.layout import cut_blocks, matrix_shape

# Plans are made here with estimate_memory's own functions, once for each host and world size, and every Shampoo is
# priced from them. It plans anew for each number of bits, and counts traffic, which takes half of its time.
from sharded_shampoo4.memory import copies_of, shard_all
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.plan import Plan, PlannedMatrix

HOSTS = ("none", "ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")

OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "muon": "Muon",
    "shampoo32": "Shampoo, 32 bits",
    "shampoo32_packed": "Shampoo, packed",
    "shampoo4": "Shampoo4",
}

OWN_OPTIONS = PreconditionerOptions()  # the library's defaults

_FLOAT = 4  # bytes
_BLOCK, _SMALLEST, _CODE_BOOKS = 256, 4096, 2 * 256 * _FLOAT  # of bitsandbytes' 8-bit optimizers

Sizes = list[list[int]]  # by rank: the elements of each tensor that the rank's optimizer is given
Orders = list[Counter[int]]  # by rank: how many factors it owns of each order


@dataclass(frozen=True)
class Layout:
    """A host on a number of ranks; under HSDP with ``replicas`` complete copies of the model."""

    host: str
    world_size: int
    replicas: int | None = None

    @property
    def copies(self) -> int:
        """How many complete copies of the sharded parameters there are."""
        return copies_of(self.host, self.world_size, self.replicas)

    @property
    def like(self) -> Layout:
        """The layout with the same shards, of which a plan may be used for this one."""
        same = {"zero0": "ddp", "zero2": "zero1"}.get(self.host, self.host)
        return Layout(same, self.world_size, self.replicas)


def local_sizes(shapes: Shapes, layout: Layout) -> Sizes:
    """What each rank's optimizer is given: a shard of each parameter, or under ZeRO 1 to 3 one padded partition."""
    if not shapes:
        return [[] for _ in range(layout.world_size)]
    return shard_all(layout.host, list(shapes.values()), layout.world_size, layout.copies).sizes


def owned_orders(shapes: Shapes, layout: Layout, options: PreconditionerOptions = OWN_OPTIONS) -> Orders:
    """The factors that each rank owns by this library's plan: two for each block, of its rows and columns."""
    sharding = shard_all(layout.host, list(shapes.values()), layout.world_size, layout.copies)
    planned = []
    for (name, shape), shards in zip(shapes.items(), sharding.shards, strict=True):
        if matrix := matrix_shape(shape):
            blocks = cut_blocks(matrix, options.max_preconditioner_dim, options.split)
            planned.append(PlannedMatrix(name, matrix, tuple(blocks), shards))
    plan = Plan(planned, layout.world_size)
    orders: Orders = [Counter() for _ in range(layout.world_size)]
    for (_, block), owner in zip(plan.blocks, plan.owners, strict=True):
        orders[owner].update((block.rows, block.columns))
    return orders


# -- optimizer states --------------------------------------------------------------------------------------------------


def adamw(sizes: Sizes) -> list[int]:
    """Bytes on each rank of AdamW's two moments and step counts."""
    return [sum(2 * _FLOAT * size for size in local) + _FLOAT * len(local) for local in sizes]


def adamw_8bit(sizes: Sizes) -> list[int]:
    """Bytes on each rank of bitsandbytes' ``AdamW8bit``, whose step counts are plain integers."""

    def bytes_of(size: int) -> int:
        return 2 * (size + _FLOAT * -(-size // _BLOCK) if size >= _SMALLEST else _FLOAT * size)

    return [sum(map(bytes_of, local)) + _CODE_BOOKS * any(size >= _SMALLEST for size in local) for local in sizes]


def takes_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon takes a parameter: torch's does 2-D weights of hidden layers, not embeddings and output layers."""
    others = ("embed", "relative_position_bias", "classifier", "lm_head")
    return len(shape) == 2 and not any(part in name for part in others)


def muon(shapes: Shapes, layout: Layout) -> list[int]:
    """Bytes on each rank of Muon's momentum, and of AdamW for what Muon does not take."""
    hidden = {name: shape for name, shape in shapes.items() if takes_muon(name, shape)}
    others = {name: shape for name, shape in shapes.items() if name not in hidden}
    momentum = [_FLOAT * sum(local) for local in local_sizes(hidden, layout)]
    return [mine + rest for mine, rest in zip(momentum, adamw(local_sizes(others, layout)), strict=True)]


def squares(order: int) -> int:
    """Bytes of a 32-bit factor: its statistics and their inverse root."""
    return 2 * _FLOAT * order * order


def triangles(order: int) -> int:
    """The same, packed: both are symmetric."""
    return 2 * _FLOAT * (order * (order + 1) // 2)


def own_factor(order: int) -> int:
    """Bytes of a factor of this library with its default options."""
    return factor_bytes(order, OWN_OPTIONS)


def factors(orders: Orders, price: Callable[[int], int]) -> list[int]:
    """Bytes of each rank's factors."""
    return [sum(count * price(order) for order, count in owned.items()) for owned in orders]


FACTOR_PRICES = {"shampoo32": squares, "shampoo32_packed": triangles, "shampoo4": own_factor}


# -- one model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes that a rank keeps. Weights and gradients are equal on all ranks; ``states`` are of the fullest one."""

    layout: Layout
    weights: int
    gradients: int
    states: dict[str, int]

    def total(self, optimizer: str) -> int:
        """Bytes on the fullest rank."""
        return self.weights + self.gradients + self.states[optimizer]


class Planner:
    """Bytes of one model under any host and optimizer; what two hosts have in common is planned once."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.parameters = sum(shape.numel() for shape in shapes.values())
        self._sizes: dict[Layout, Sizes] = {}
        self._orders: dict[Layout, Orders] = {}

    def footprint(self, layout: Layout, optimizers: Iterable[str] = OPTIMIZERS) -> Footprint:
        """What the fullest rank keeps, with the states of each of ``optimizers``."""
        states = {optimizer: max(self.states(layout, optimizer)) for optimizer in optimizers}
        return Footprint(layout, self.weights(layout), self.gradients(layout), states)

    def states(self, layout: Layout, optimizer: str) -> list[int]:
        """Bytes of ``optimizer``'s states on each rank."""
        if optimizer == "muon":
            return muon(self.shapes, layout)
        sizes = self._local_sizes(layout.like)
        if optimizer == "adamw8bit":
            return adamw_8bit(sizes)
        base = adamw(sizes)
        if optimizer == "adamw":
            return base
        owned = factors(self._owned_orders(layout.like), FACTOR_PRICES[optimizer])
        return [mine + more for mine, more in zip(base, owned, strict=True)]

    def weights(self, layout: Layout) -> int:
        """Bytes of float32 weights on every rank.

        FSDP2 pads each shard to the size of the first rank's. ZeRO 1 and 2 keep all weights in one padded vector and,
        also where these are float32 already, the rank's partition a second time, for the optimizer.
        """
        held = max(map(sum, self._local_sizes(layout.like)))
        return _FLOAT * held * (layout.world_size + 1 if layout.host in ("zero1", "zero2") else 1)

    def gradients(self, layout: Layout) -> int:
        """Bytes of float32 gradients on every rank after the backward pass: all of them, or those of its shards."""
        if layout.host == "zero1":
            return _FLOAT * self.parameters
        return _FLOAT * max(map(sum, self._local_sizes(layout.like)))

    def _local_sizes(self, layout: Layout) -> Sizes:
        if layout not in self._sizes:
            self._sizes[layout] = local_sizes(self.shapes, layout)
        return self._sizes[layout]

    def _owned_orders(self, layout: Layout) -> Orders:
        if layout not in self._orders:
            self._orders[layout] = owned_orders(self.shapes, layout)
        return self._orders[layout]
