"""What a rank copies, sends and receives in each round of a plan, worked out once.

A piece is a rectangle of a block. It stands in a shard of its matrix, in a batch of blocks, and in a message, where
pieces follow one another. ``copies.py`` brings pieces from one of these places to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .copies import Copies, Piece
from .plan import Incoming, Outgoing, Owned, Plan


@dataclass(frozen=True)
class Way:
    """What one rank does to bring pieces from shards to batches, or from batches to shards.

    Attributes:
        sent: elements for each rank, this one left out.
        received: elements from each rank, this one left out.
        pack: from where pieces stand to the message for other ranks.
        unpack: from the message of other ranks to where pieces are to stand; of ``shared``, if there is one.
        here: pieces that stay on this rank; to their place in what is ``shared``, if there is that.
        shared: elements that each of the ranks with equal shards gives to all of them: what it has received, what
            stays here, and zeros up to the longest. None: a rank gets everything in its own message.
    """

    sent: list[int]
    received: list[int]
    pack: Copies
    unpack: Copies
    here: Copies
    shared: int | None = None


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

        def in_shards(wanted: Callable[[Outgoing], bool]) -> list[list[Piece]]:
            return [[self._in_shard(piece) for piece in pieces if wanted(piece)] for pieces in whole.to_owner]

        def in_batch(wanted: Callable[[Incoming], bool]) -> list[list[Piece]]:
            return [
                [_in_batch(piece, place[piece.position], mine) for piece in pieces if wanted(piece)]
                for pieces in whole.from_holder
            ]

        back = in_batch(lambda piece: piece.position in place and directed[mine[piece.position].matrix])
        gradients = self._way(
            in_shards(lambda piece: active[piece.matrix] and piece.gives_gradient),
            in_batch(lambda piece: piece.position in place and piece.gives_gradient),
        )
        returned = in_shards(lambda piece: directed[piece.matrix])
        return Part(
            number,
            chosen,
            tuple(self._numbers[mine[position]] for position in chosen),
            gradients,
            self._shared_way(back, returned) if self._plan.twins else self._way(back, returned),
        )

    def _way(self, before: list[list[Piece]], after: list[list[Piece]]) -> Way:
        """The way of pieces, listed for each other rank, from where they stand ``before`` to where ``after``."""
        here = Copies(before[self._rank], after[self._rank])
        before[self._rank], after[self._rank] = [], []
        leaving, coming = _joined(before), _joined(after)
        return Way(
            [_elements(pieces) for pieces in before],
            [_elements(pieces) for pieces in after],
            Copies(leaving, _in_message(leaving)),
            Copies(_in_message(coming), coming),
            here,
        )

    def _shared_way(self, before: list[list[Piece]], after: list[list[Piece]]) -> Way:
        """The way of directions where ranks with equal shards share what each has from the owners of its replica.

        ``before`` has the pieces for this replica, ``after`` those from the owners of all replicas.
        """
        twins = self._plan.twins
        parts = []
        for twin in twins.of(self._rank):  # what it receives, in order of the ranks, then what it has itself
            mates = [rank for rank in twins.mates(twin) if rank != twin]
            parts.append([*_joined([after[rank] for rank in mates]), *after[twin]])
        longest = max(map(_elements, parts))
        coming = [_in_message(part, index * longest) for index, part in enumerate(parts)]
        received = [0] * len(after)
        for rank in twins.mates(self._rank):
            received[rank] = 0 if rank == self._rank else _elements(after[rank])
        staying = before[self._rank]
        here = Copies(staying, _in_message(staying, sum(received)))
        before[self._rank] = []
        leaving = _joined(before)
        return Way(
            [_elements(pieces) for pieces in before],
            received,
            Copies(leaving, _in_message(leaving)),
            Copies(_joined(coming), _joined(parts)),
            here,
            longest,
        )

    def _in_shard(self, outgoing: Outgoing) -> Piece:
        matrix, piece = self._plan.matrices[outgoing.matrix], outgoing.piece
        width, shard = matrix.shape[1], matrix.shards[self._rank]
        offset = shard.place(piece.row * width + piece.column)
        return Piece(outgoing.matrix, piece.rows, piece.columns, shard.row_width(width), offset)


def _in_batch(incoming: Incoming, place: int, mine: Sequence[Owned]) -> Piece:
    block, piece = mine[incoming.position].block, incoming.piece
    offset = (place * block.rows + piece.row) * block.columns + piece.column
    return Piece(0, piece.rows, piece.columns, block.columns, offset)


def _in_message(pieces: Sequence[Piece], start: int = 0) -> list[Piece]:
    """Where pieces stand one after another in a vector, from ``start`` on."""
    found = []
    for piece in pieces:
        found.append(Piece(0, piece.rows, piece.columns, piece.columns, start))
        start += piece.rows * piece.columns
    return found


def _joined(lists: Sequence[Sequence[Piece]]) -> list[Piece]:
    return [piece for pieces in lists for piece in pieces]


def _elements(pieces: Sequence[Piece]) -> int:
    return sum(piece.rows * piece.columns for piece in pieces)
