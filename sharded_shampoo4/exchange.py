"""Carries a plan out: gradient pieces to owners, directions back, batch by batch.

Both ways go through ``all_to_all_single``. While one batch is computed, the gradients of the next and the directions of
the previous one are under way: memory in flight is that of two batches each way, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from .labels import label
from .layout import Block
from .plan import Incoming, Outgoing, Plan
from .ranks import Company, Ranks

# Given the number of one of this rank's batches, the positions in it that take part, and their gradients
# (k, rows, columns): their directions.
Compute = Callable[[int, list[int], Tensor], Tensor]


def wire_dtype(dtypes: Sequence[torch.dtype], rounded: Sequence[bool]) -> torch.dtype:
    """In what pieces travel, of matrices that are computed in ``dtypes`` and ``rounded`` to bfloat16 or not."""
    if rounded and all(rounded):
        return torch.bfloat16
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass(frozen=True)
class Part:
    """What takes part in one round: lists of pieces are indexed by the other rank."""

    number: int
    chosen: list[int]  # positions in this rank's batch
    send_gradients: list[list[Outgoing]]
    receive_gradients: list[list[Incoming]]  # ``position`` counts the chosen ones
    send_directions: list[list[Incoming]]
    receive_directions: list[list[Outgoing]]


class Exchange:
    """One rank's part in ``plan``, which ``ranks`` carry out.

    What fails on this rank is kept in ``company``, and every collective of the step still takes place, with zeros for
    what could not be computed: no rank waits for one that has left.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        devices: list[torch.device],
        dtypes: list[torch.dtype],
        rounded: list[bool],
    ) -> None:
        self.plan = plan
        self.ranks = ranks
        self.rank = ranks.rank
        self.company = Company(ranks)  # of the step that is under way
        self.devices = devices  # on which every matrix is computed; an offloaded shard may be on the host
        self.dtypes = dtypes  # in which every matrix is computed
        # Rounded to bfloat16, gradients and directions, also where they need not travel: ranks change no number.
        self.rounded = rounded
        self.wire = wire_dtype(dtypes, rounded)
        self._rounds = [plan.round(self.rank, number) for number in range(plan.rounds)]
        self._batches = plan.batches[self.rank]
        self._parts = lru_cache(maxsize=8)(self._select)

    @property
    def bytes_sent(self) -> int:
        """To other ranks, so far."""
        return self.ranks.bytes_sent

    def run(
        self,
        shards: Sequence[Tensor],
        targets: Sequence[Tensor],
        active: tuple[bool, ...],
        directed: tuple[bool, ...],
        compute: Compute,
    ) -> None:
        """Write what ``compute`` makes of the gradients' blocks to ``targets``.

        ``shards`` are this rank's flattened gradients of all matrices; the targets may be the same tensors. Blocks of
        ``active`` matrices go to their owners; those of ``directed`` ones, a subset, come back. Both must be the same
        on every rank. ``company`` has what failed.
        """
        parts = self._parts(active, directed)
        with label("gather"):
            gradients = self._send_gradients(parts[0], shards) if parts else None
        arriving: _Arriving | None = None
        for index, part in enumerate(parts):
            with label("gather"):
                following = self._send_gradients(parts[index + 1], shards) if index + 1 < len(parts) else None
            assert gradients is not None
            directions = self._compute(part, gradients, shards, compute)
            with label("send_back"):
                if arriving is not None:
                    arriving.write()
                arriving = self._send_directions(part, directions, targets)
            gradients = following
        if arriving is not None:
            with label("send_back"):
                arriving.write()

    def _select(self, active: tuple[bool, ...], directed: tuple[bool, ...]) -> list[Part]:
        """The rounds in which anything takes part, on whatever rank, and what does."""
        parts = []
        for number, whole in enumerate(self._rounds):
            batches = [batches[number] for batches in self.plan.batches if number < len(batches)]
            if not any(active[owned.matrix] for batch in batches for owned in batch):
                continue
            mine = self._batches[number] if number < len(self._batches) else []
            chosen = [position for position, owned in enumerate(mine) if active[owned.matrix]]
            place = {position: index for index, position in enumerate(chosen)}

            def incoming(pieces: list[Incoming], wanted: Callable[[Incoming], bool]) -> list[Incoming]:
                return [p._replace(position=place[p.position]) for p in pieces if p.position in place and wanted(p)]  # noqa: B023

            def is_directed(piece: Incoming) -> bool:
                return directed[mine[piece.position].matrix]  # noqa: B023

            parts.append(
                Part(
                    number,
                    chosen,
                    [[p for p in pieces if active[p.matrix] and p.gives_gradient] for pieces in whole.to_owner],
                    [incoming(pieces, lambda p: p.gives_gradient) for pieces in whole.from_holder],
                    [incoming(pieces, is_directed) for pieces in whole.from_holder],
                    [[p for p in pieces if directed[p.matrix]] for pieces in whole.to_owner],
                )
            )
        return parts

    def _send_gradients(self, part: Part, shards: Sequence[Tensor]) -> _Arriving:
        """Start the gradients' way to their owners."""

        def outgoing() -> list[list[Tensor]]:
            return [[self._view(shards, p.matrix, p.piece) for p in pieces] for pieces in part.send_gradients]

        return self._start(outgoing, _sizes(part.send_gradients), _sizes(part.receive_gradients))

    def _compute(self, part: Part, arriving: _Arriving, shards: Sequence[Tensor], compute: Compute) -> Tensor | None:
        """Put the gradients of this rank's blocks together and have their directions computed."""
        with label("gather"):
            gathered = self.company.attempt(self._gather_own, part, shards) if part.chosen else None
            if gathered is None:
                arriving.wait()
                return None
            gradients, places = gathered
            arriving.write(places)
        return self.company.attempt(self._directions, part, gradients, compute)

    def _gather_own(self, part: Part, shards: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
        """The gradients of this rank's blocks with what it holds of them, and the places for what others hold."""
        matrix, block = self._batches[part.number][part.chosen[0]]
        shape = (len(part.chosen), block.rows, block.columns)
        gradients = torch.empty(shape, dtype=self.dtypes[matrix], device=self.devices[matrix])
        places = [[gradients[p.position][p.piece.slices] for p in pieces] for pieces in part.receive_gradients]
        here = part.send_gradients[self.rank]
        _copy(places[self.rank], [self._view(shards, p.matrix, p.piece) for p in here])
        places[self.rank] = []
        return gradients, places

    def _directions(self, part: Part, gradients: Tensor, compute: Compute) -> Tensor:
        if not self.rounded[self._batches[part.number][part.chosen[0]].matrix]:
            return compute(part.number, part.chosen, gradients)
        gradients = gradients.to(torch.bfloat16).to(gradients.dtype)
        return compute(part.number, part.chosen, gradients).to(torch.bfloat16).to(gradients.dtype)

    def _send_directions(self, part: Part, directions: Tensor | None, targets: Sequence[Tensor]) -> _Arriving:
        """Start the directions' way back; those that stay here are written at once."""

        def outgoing() -> list[list[Tensor]]:
            if directions is None:
                return [[] for _ in part.send_directions]
            return [[directions[p.position][p.piece.slices] for p in pieces] for pieces in part.send_directions]

        def places() -> list[list[Tensor]]:
            views = [[self._view(targets, p.matrix, p.piece) for p in pieces] for pieces in part.receive_directions]
            _copy(views[self.rank], outgoing()[self.rank])
            views[self.rank] = []
            return views

        written = self.company.attempt(places)
        arriving = self._start(outgoing, _sizes(part.send_directions), _sizes(part.receive_directions))
        arriving.places = written or []
        return arriving

    def _start(self, outgoing: Callable[[], list[list[Tensor]]], sent: list[int], sizes: list[int]) -> _Arriving:
        """Send views to ranks, a list for each with ``sent`` elements, and expect ``sizes`` elements from each."""
        if self.ranks.size == 1:
            return _Arriving(self, None, [])
        sent[self.rank] = sizes[self.rank] = 0
        device = self.devices[0]

        def packed() -> Tensor:
            views = [view for rank, views in enumerate(outgoing()) if rank != self.rank for view in views]
            flat = [view.to(self.wire).reshape(-1) for view in views]
            return torch.cat(flat).to(device) if flat else torch.empty(0, dtype=self.wire, device=device)

        send = self.company.attempt(packed)
        if send is None:
            send = torch.zeros(sum(sent), dtype=self.wire, device=device)
        receive = self.company.buffer(lambda: torch.empty(sum(sizes), dtype=self.wire, device=device))
        self.ranks.bytes_sent += send.numel() * send.element_size()
        work = self.ranks.start_all_to_all(receive, send, sizes, sent)
        return _Arriving(self, work, list(receive.split(sizes)), send)

    def _view(self, shards: Sequence[Tensor], matrix: int, piece: Block) -> Tensor:
        """A piece of a matrix in this rank's shard of it."""
        planned, shard = self.plan.matrices[matrix], shards[matrix]
        width = planned.shape[1]
        offset = piece.row * width + piece.column - planned.shards[self.rank].start
        return shard.as_strided((piece.rows, piece.columns), (width, 1), shard.storage_offset() + offset)


class _Arriving:
    """Elements on their way from every other rank."""

    def __init__(
        self, exchange: Exchange, work: dist.Work | None, received: list[Tensor], sent: Tensor | None = None
    ) -> None:
        self._exchange = exchange
        self._work = work
        self._received = received
        self._sent = sent  # must live until the work is done
        self.places: list[list[Tensor]] = []

    def wait(self) -> None:
        if self._work is not None:
            with self._exchange.ranks.explaining():
                self._work.wait()

    def write(self, places: list[list[Tensor]] | None = None) -> None:
        """Wait, and write what came from each rank to its ``places``, in order."""
        self.wait()
        if self._work is not None:
            self._exchange.company.attempt(self._write, self.places if places is None else places)

    def _write(self, places: list[list[Tensor]]) -> None:
        for views, received in zip(places, self._received, strict=True):
            if views:
                parts = received.to(views[0].device).split([view.numel() for view in views])
                _copy(views, [part.view(view.shape) for part, view in zip(parts, views, strict=True)])


def _sizes(pieces: Sequence[Sequence[Incoming]] | Sequence[Sequence[Outgoing]]) -> list[int]:
    """How many elements the pieces for each rank have."""
    return [sum(piece.piece.rows * piece.piece.columns for piece in part) for part in pieces]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
