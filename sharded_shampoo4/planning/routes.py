"""What a rank copies, sends and receives in each round of a plan, as strided views that are worked out once.

A piece is a rectangle of a block, and lies in a shard of its matrix as well as in a batch of blocks. Pieces that follow
one another in both, such as the blocks of a matrix that is cut by rows, are copied as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .plan import Incoming, Outgoing, Owned, Plan


class Slot(NamedTuple):
    """Where elements stand in one of several tensors: arguments of ``as_strided``, from the tensor's start on."""

    tensor: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Slots:
    """Where the parts of a message stand, in the order of the message."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = tuple(slots)
        self._counts = [math.prod(slot.size) for slot in slots]
        self._sizes = [None if len(slot.size) == 1 else slot.size for slot in slots]
        self.elements = sum(self._counts)

    def __bool__(self) -> bool:
        return bool(self._slots)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts, as views of the contiguous ``tensors``."""
        found = []
        for index, size, stride, offset in self._slots:
            tensor = tensors[index]
            found.append(tensor.as_strided(size, stride, tensor.storage_offset() + offset))
        return found

    def cut(self, message: Tensor) -> list[Tensor]:
        """The parts of a vector that holds them one after another."""
        parts = message.split(self._counts)
        return [part if size is None else part.view(size) for part, size in zip(parts, self._sizes, strict=True)]


@dataclass(frozen=True)
class Way:
    """What one rank does to bring pieces from shards to batches, or from batches to shards.

    Attributes:
        sent: elements for each rank, this one left out.
        received: elements from each rank, this one left out.
        outgoing: where they stand before, rank by rank.
        incoming: where they are to stand, rank by rank.
        here: where pieces stand that stay on this rank, and where they are to stand.
    """

    sent: list[int]
    received: list[int]
    outgoing: Slots
    incoming: Slots
    here: tuple[Slots, Slots]


@dataclass(frozen=True)
class Part:
    """What takes part in one round.

    Attributes:
        number: of this rank's batch.
        chosen: positions in this batch.
        blocks: the numbers of the chosen blocks in ``plan.blocks``.
        gradients: their way from the shards to this rank's chosen blocks, (chosen, rows, columns).
        directions: the way back.
    """

    number: int
    chosen: list[int]
    blocks: tuple[int, ...]
    gradients: Way
    directions: Way


class Routes:
    """The ways of one rank's pieces in every round of ``plan``."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan = plan
        self._rank = rank
        self._rounds = [plan.round(rank, number) for number in range(plan.rounds)]
        self._numbers = {owned: number for number, owned in enumerate(plan.blocks)}

    def parts(self, active: Sequence[bool], directed: Sequence[bool]) -> list[Part]:
        """The rounds in which anything takes part, on whatever rank.

        Args:
            active: for each matrix, whether its gradient goes to the owners of its blocks.
            directed: for each matrix, whether directions come back.
        """
        parts = []
        for number in range(len(self._rounds)):
            batches = [batches[number] for batches in self._plan.batches if number < len(batches)]
            if any(active[owned.matrix] for batch in batches for owned in batch):
                parts.append(self._part(number, active, directed))
        return parts

    def _part(self, number: int, active: Sequence[bool], directed: Sequence[bool]) -> Part:
        whole, batches = self._rounds[number], self._plan.batches[self._rank]
        mine = batches[number] if number < len(batches) else []
        chosen = [position for position, owned in enumerate(mine) if active[owned.matrix]]
        place = {position: index for index, position in enumerate(chosen)}

        def in_shards(wanted: Callable[[Outgoing], bool]) -> list[list[_Piece]]:
            return [[self._in_shard(piece) for piece in pieces if wanted(piece)] for pieces in whole.to_owner]

        def in_batch(wanted: Callable[[Incoming], bool]) -> list[list[_Piece]]:
            return [
                [_in_batch(piece, place[piece.position], mine) for piece in pieces if wanted(piece)]
                for pieces in whole.from_holder
            ]

        return Part(
            number,
            chosen,
            tuple(self._numbers[mine[position]] for position in chosen),
            self._way(
                in_shards(lambda piece: active[piece.matrix] and piece.gives_gradient),
                in_batch(lambda piece: piece.position in place and piece.gives_gradient),
            ),
            self._way(
                in_batch(lambda piece: piece.position in place and directed[mine[piece.position].matrix]),
                in_shards(lambda piece: directed[piece.matrix]),
            ),
        )

    def _way(self, before: list[list[_Piece]], after: list[list[_Piece]]) -> Way:
        """The way of pieces, listed for each other rank, from where they stand ``before`` to where ``after``."""
        here = _slots(before[self._rank], after[self._rank])
        before[self._rank], after[self._rank] = [], []
        return Way(
            [_elements(pieces) for pieces in before],
            [_elements(pieces) for pieces in after],
            _slots([piece for pieces in before for piece in pieces])[0],
            _slots([piece for pieces in after for piece in pieces])[0],
            (here[0], here[1]),
        )

    def _in_shard(self, outgoing: Outgoing) -> _Piece:
        matrix, piece = self._plan.matrices[outgoing.matrix], outgoing.piece
        width, start = matrix.shape[1], matrix.shards[self._rank].start
        return _Piece(outgoing.matrix, piece.rows, piece.columns, width, piece.row * width + piece.column - start)


class _Piece(NamedTuple):
    """A rectangle in one of several tensors, whose rows are ``width`` elements apart, the first at ``offset``."""

    tensor: int
    rows: int
    columns: int
    width: int
    offset: int


def _in_batch(incoming: Incoming, place: int, mine: Sequence[Owned]) -> _Piece:
    block, piece = mine[incoming.position].block, incoming.piece
    offset = (place * block.rows + piece.row) * block.columns + piece.column
    return _Piece(0, piece.rows, piece.columns, block.columns, offset)


def _slots(*sides: list[_Piece]) -> list[Slots]:
    """The places of the same pieces on one or two sides; on all sides they are of the same sizes."""
    found: list[list[Slot]] = [[] for _ in sides]
    start, count = 0, len(sides[0])
    for stop in range(1, count + 1):
        if stop < count and all(_continues(side, start, stop) for side in sides):
            continue
        runs = [side[start:stop] for side in sides]
        flat = all(map(_is_dense, runs))
        for slots, run in zip(found, runs, strict=True):
            slots.append(_slot(run, flat))
        start = stop
    return [Slots(slots) for slots in found]


def _continues(side: list[_Piece], start: int, index: int) -> bool:
    """Whether the piece at ``index`` lies behind those from ``start`` on as they lie behind one another."""
    step = side[index].offset - side[index - 1].offset
    return side[index][:4] == side[start][:4] and step > 0 and step == side[start + 1].offset - side[start].offset


def _step(run: list[_Piece]) -> int:
    return run[1].offset - run[0].offset if len(run) > 1 else 0


def _is_dense(run: list[_Piece]) -> bool:
    first = run[0]
    rows_touch = first.rows == 1 or first.columns == first.width
    return rows_touch and (len(run) == 1 or _step(run) == first.rows * first.columns)


def _slot(run: list[_Piece], flat: bool) -> Slot:
    tensor, rows, columns, width, offset = run[0]
    if flat:
        return Slot(tensor, (len(run) * rows * columns,), (1,), offset)
    return Slot(tensor, (len(run), rows, columns), (_step(run), width, 1), offset)


def _elements(pieces: list[_Piece]) -> int:
    return sum(piece.rows * piece.columns for piece in pieces)
