"""Who owns what and what travels where: pure, deterministic, the same on every rank.

Blocks are cut on the global parameter matrix and each has one owner, which keeps its factors and computes its
directions. What a host decides is only which elements of a parameter each rank holds, and so which pieces of a block's
gradient travel to the owner and which pieces of its direction travel back.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .blocks import Block
from .loads import Loads, Work
from .schedule import Phases
from .shards import Rectangle, Shard, shard_pieces
from .twins import Twins

# Elements of a batch's gradients, directions and dequantised roots together, for each MiB of scratch memory: a quarter
# of it. The rest is for what dequantising takes, and for the pieces of two more batches that are under way.
BATCH_ELEMENTS_PER_MIB = 2**16


@dataclass(frozen=True)
class PlannedMatrix:
    """A parameter matrix: its blocks, the shard of each rank, and what blocks must share to stand in one batch.

    ``phases``: those of its factors that are not refreshed together with all others.
    """

    name: str
    shape: tuple[int, int]
    blocks: tuple[Block, ...]
    shards: tuple[Shard, ...]
    kind: Hashable = None
    scratch_mib: int = 256
    phases: Phases = field(default_factory=dict)

    @cached_property
    def replicas(self) -> int:
        """How many complete copies there are."""
        return len({shard.replica for shard in self.shards if shard.start < shard.stop})

    def check(self) -> None:
        """Raise ValueError unless the shards of every replica tile the matrix."""
        replicas: dict[int, list[Shard]] = defaultdict(list)
        for shard in self.shards:
            if shard.start < shard.stop:
                replicas[shard.replica].append(shard)
        size = self.shape[0] * self.shape[1]
        for replica, shards in replicas.items():
            if not _tile(shards, size):
                described = ", ".join(shard.describe() for shard in sorted(shards))
                raise ValueError(
                    f"the shards of {self.name} in replica {replica} do not tile its {size} elements: {described}"
                )
        if not replicas:
            raise ValueError(f"no rank holds any element of {self.name}")


class Owned(NamedTuple):
    """A block: the index of its matrix, and where it lies."""

    matrix: int
    block: Block


class Outgoing(NamedTuple):
    """A piece of a block that this rank holds, in coordinates of the matrix; its direction comes back the same way."""

    matrix: int
    piece: Rectangle
    gives_gradient: bool  # or only takes the direction, being in another replica than the owner


class Incoming(NamedTuple):
    """A piece of the block at ``position`` in this rank's batch, in coordinates of the block, held by another rank.

    Where ranks have twins, only those of this rank's replica are listed.
    """

    position: int
    piece: Rectangle
    gives_gradient: bool


@dataclass(frozen=True)
class Round:
    """One batch of every rank, and what this rank exchanges for it. Lists are indexed by the other rank.

    Both ends list the pieces that they share in the same order: that of the blocks in the owner's batch.
    """

    to_owner: list[list[Outgoing]]
    from_holder: list[list[Incoming]]


class Plan:
    """Owners, batches and routes for ``matrices``, which have a shard on each of ``world_size`` ranks.

    ``others`` is the work that every rank has already, by other plans: blocks go to those with little of it.
    """

    def __init__(self, matrices: Sequence[PlannedMatrix], world_size: int, others: Work | None = None) -> None:
        self.matrices = list(matrices)
        self.world_size = world_size
        for matrix in matrices:
            matrix.check()
        self.blocks = [Owned(index, block) for index, matrix in enumerate(matrices) for block in matrix.blocks]
        self.twins = Twins([matrix.shards for matrix in matrices], world_size)
        self._holders = [_Holders(matrix, bool(self.twins)) for matrix in matrices]
        self.owners, self.work = self._assign_owners(others or Counter())
        self.batches = self._batches()

    @property
    def rounds(self) -> int:
        """Batches of the rank that has most."""
        return max(map(len, self.batches))

    @cached_property
    def owner_of(self) -> dict[Owned, int]:
        return dict(zip(self.blocks, self.owners, strict=True))

    def mates(self, rank: int) -> Sequence[int]:
        """The ranks that exchange gradients and directions with a rank, itself among them: those of its replica.

        All ranks, unless they have twins.
        """
        return self.twins.mates(rank) if self.twins else range(self.world_size)

    def _assign_owners(self, others: Work) -> tuple[list[int], Work]:
        """An owner for each block, and the work that this adds; the most work first.

        As long as loads are even, ranks are preferred that refresh little at the phases of the block, then those that
        hold much of it.
        """
        costs = [_work(block) for _, block in self.blocks]
        loads = Loads(others, self.world_size, sum(costs), self.twins)
        owners = [0] * len(self.blocks)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):  # stable: by parameter, row, column
            matrix, block = self.blocks[index]
            held, phases = self._holders[matrix].elements(block), self.matrices[matrix].phases.get(block, ())
            owners[index] = owner = loads.least(costs[index], held, [phase.statistics for phase in phases])
            loads.add(owner, None, costs[index])
            for order, phase in zip(block.orders, phases, strict=False):
                loads.add(owner, phase.statistics, order**3)
        return owners, loads.work - others

    def _batches(self) -> list[list[list[Owned]]]:
        """The blocks of each owner, equal kinds and shapes together, in batches of bounded size.

        What there is most of comes first, on all ranks, so that their batches of a round are alike.
        """
        alike: list[dict[Hashable, list[Owned]]] = [{} for _ in range(self.world_size)]
        elements: Counter[Hashable] = Counter()
        key: Hashable
        for owned, owner in zip(self.blocks, self.owners, strict=True):
            key = (self.matrices[owned.matrix].kind, owned.block._replace(row=0, column=0))
            alike[owner].setdefault(key, []).append(owned)
            elements[key] += owned.block.rows * owned.block.columns
        batches: list[list[list[Owned]]] = [[] for _ in alike]
        for key, _ in elements.most_common():
            for rank, of_rank in enumerate(alike):
                members = of_rank.get(key, [])
                size = self._batch_size(members[0]) if members else 1
                batches[rank] += [members[start : start + size] for start in range(0, len(members), size)]
        return batches

    def _batch_size(self, owned: Owned) -> int:
        matrix, block = self.matrices[owned.matrix], owned.block
        elements = block.rows * block.columns
        # A rank computes its own batch, and receives the directions of as many batches as there are replicas.
        needed = max(sum(order**2 for order in block.orders) + 2 * elements, matrix.replicas * elements)
        return max(1, BATCH_ELEMENTS_PER_MIB * matrix.scratch_mib // needed)

    def round(self, rank: int, number: int) -> Round:
        """What ``rank`` exchanges for everyone's batch ``number``."""
        to_owner: list[list[Outgoing]] = [[] for _ in range(self.world_size)]
        from_holder: list[list[Incoming]] = [[] for _ in range(self.world_size)]
        for owner, batches in enumerate(self.batches):
            for position, (index, block) in enumerate(batches[number] if number < len(batches) else []):
                shards = self.matrices[index].shards
                replica = shards[owner].replica
                if owner == rank:
                    for holder, piece in self._holders[index].pieces(block):
                        inside = piece._replace(row=piece.row - block.row, column=piece.column - block.column)
                        near = self.twins.near(holder, owner)
                        from_holder[near].append(Incoming(position, inside, shards[near].replica == replica))
                shard = shards[rank]
                for piece in shard_pieces(block, self.matrices[index].shape[1], shard):
                    to_owner[owner].append(Outgoing(index, piece, shard.replica == replica))
        return Round(to_owner, from_holder)

    def loads(self) -> list[int]:
        """The matrix work of every rank."""
        return [self.work[rank, None] for rank in range(self.world_size)]

    def elements_sent(self) -> list[int]:
        """Elements that every rank sends in a step in which all blocks take part: gradients, and directions back.

        Ranks with equal shards share directions: what each has is sent once for each of the others, filled up to the
        longest.
        """
        sent = [0] * self.world_size
        for number in range(self.rounds):
            held = [0] * self.world_size  # of the directions of this round
            for owner, batches in enumerate(self.batches):
                for index, block in batches[number] if number < len(batches) else []:
                    shards = self.matrices[index].shards
                    for holder, count in self._holders[index].elements(block).items():
                        near = self.twins.near(holder, owner)
                        held[near] += count
                        if near != owner:
                            sent[owner] += count
                            sent[near] += count * (shards[near].replica == shards[owner].replica)
            for twins in self.twins.groups:
                longest = max(held[twin] for twin in twins)
                for twin in twins:
                    sent[twin] += longest * (len(twins) - 1)
        return sent


def _work(block: Block) -> int:
    """The matrix work of a block: the cubes of its factors' orders."""
    return sum(order**3 for order in block.orders)


def _tile(shards: Sequence[Shard], size: int) -> bool:
    """Whether shards of one replica hold each of ``size`` elements once."""
    stride, lanes = shards[0].stride or 1, _lanes(shards)
    if any(shard.stride != shards[0].stride for shard in shards) or size % stride:
        return False
    rows = [[_rows(shard) for shard in lane] for lane in lanes.values()]
    return _follow(lanes, stride) and all(_follow(lane, size // stride) for lane in rows)


def _lanes(shards: Iterable[Shard]) -> dict[tuple[int, int], list[Shard]]:
    """Shards by the columns of their table, from the first to the end. Plain intervals are rows of one column."""
    lanes: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in shards:
        first = shard.start % shard.stride if shard.stride else 0
        lanes[first, first + (shard.stop - shard.start if shard.stride else 1)].append(shard)
    return lanes


def _rows(shard: Shard) -> tuple[int, int]:
    """The rows of its table that a shard has, from the first to the end."""
    if not shard.stride:
        return shard.start, shard.stop
    first = shard.start // shard.stride
    return first, first + shard.repeats


def _follow(intervals: Iterable[tuple[int, int]], end: int) -> bool:
    """Whether intervals, once sorted, follow one another from 0 to ``end``."""
    starts, stops = zip(*sorted(intervals), strict=True)
    return (*starts, end) == (0, *stops)


class _Lane:
    """The shards of a replica that have the same columns of their table, from the first row to the last."""

    def __init__(self, first: int, end: int, entries: list[tuple[Shard, int]]) -> None:
        self.first, self.end = first, end  # columns
        self._entries = sorted(entries)  # shards with their ranks
        self._starts = [_rows(shard)[0] for shard, _ in self._entries]

    def overlapping(self, first: int, last: int) -> Iterator[tuple[Shard, int]]:
        """Yield those with any of the rows ``first`` to ``last``."""
        begin = bisect.bisect_right(self._starts, first) - 1
        yield from self._entries[begin : bisect.bisect_right(self._starts, last)]


class _Holders:
    """Who holds which part of a matrix's blocks; where ranks have twins, those of the first replica."""

    def __init__(self, matrix: PlannedMatrix, have_twins: bool) -> None:
        self.width = matrix.shape[1]
        self._replicas: list[tuple[int, list[int], list[_Lane]]] = []  # stride, ends of lanes, lanes
        grouped: dict[int, list[tuple[Shard, int]]] = defaultdict(list)
        for rank, shard in enumerate(matrix.shards):
            if shard.start < shard.stop:
                grouped[shard.replica].append((shard, rank))
        for _, entries in sorted(grouped.items())[: 1 if have_twins else None]:
            ranks = dict(entries)
            lanes = [
                _Lane(*columns, [(shard, ranks[shard]) for shard in shards])
                for columns, shards in sorted(_lanes(ranks).items())
            ]
            self._replicas.append((entries[0][0].stride, [lane.end for lane in lanes], lanes))

    def pieces(self, block: Block) -> Iterator[tuple[int, Rectangle]]:
        """Every rank's pieces of ``block``, rank by rank within a replica, in coordinates of the matrix."""
        first = block.row * self.width + block.column
        last = (block.row + block.rows - 1) * self.width + block.column + block.columns - 1
        for stride, ends, lanes in self._replicas:
            unit = stride or 1
            left, right = self._columns(block, first, last, unit)
            for lane in lanes[bisect.bisect_right(ends, left) :]:
                if lane.first >= right:
                    break
                for shard, rank in lane.overlapping(first // unit, last // unit):
                    for piece in shard_pieces(block, self.width, shard):
                        yield rank, piece

    def _columns(self, block: Block, first: int, last: int, stride: int) -> tuple[int, int]:
        """Columns of the shards' table, with rows of ``stride`` elements, between which all of ``block`` lies."""
        if self.width % stride == 0:  # all rows of the block are alike
            first, last = block.column, block.column + block.columns - 1
        same = first // stride == last // stride
        return (first % stride, last % stride + 1) if same else (0, stride)

    def elements(self, block: Block) -> dict[int, int]:
        """How many elements of ``block`` each rank holds; ranks without any are left out."""
        held: dict[int, int] = defaultdict(int)
        for rank, piece in self.pieces(block):
            held[rank] += piece.rows * piece.columns
        return dict(held)
