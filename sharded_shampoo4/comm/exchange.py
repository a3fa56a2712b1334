"""Carries a plan out: gradients to the owners of blocks, directions back, batch by batch.

Both ways go through ``all_to_all_single``. Under DDP and HSDP directions go to the owner's replica only, and an
``all_gather`` among the ranks with equal shards brings them to the others. While one batch is computed, the gradients
of the next and the directions of the previous one are under way: memory in flight is that of two batches each way,
whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..labels import label
from ..planning.copies import Copies
from ..planning.plan import Plan
from ..planning.routes import Part, Routes, Way
from .ranks import DeferredErrors, Ranks


def wire_dtype(dtypes: Sequence[torch.dtype], rounded: Sequence[bool]) -> torch.dtype:
    """In what pieces travel, of matrices that are computed in ``dtypes`` and ``rounded`` to bfloat16 or not."""
    if rounded and all(rounded):
        return torch.bfloat16
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass
class Arrived:
    """One of this rank's batches, or those of its blocks that take part.

    Attributes:
        part: what takes part: the batch, the positions of the blocks in it, and their numbers in the plan.
        gradients: (blocks, rows, columns); None if this rank has nothing to compute: no block takes part, or something
            has failed. :meth:`Exchange.send_back` lets go of them.
    """

    part: Part
    gradients: Tensor | None


class Exchange:
    """One rank's part in a plan.

    What fails on this rank is kept in the step's ``errors``, and every collective of the step still takes place, with
    zeros for what could not be computed: no rank waits for one that has left.

    Args:
        plan: who owns which block, and which rank holds which elements.
        ranks: the ranks that carry it out.
        devices: on which every matrix is computed; an offloaded shard may be on the host.
        dtypes: in which every matrix is computed.
        rounded: whether a matrix's gradients and directions are rounded to bfloat16, also where they need not travel:
            ranks change no number.
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
        self.devices = devices
        self.device = devices[0] if devices else torch.device("cpu")  # of messages; without matrices there are none
        self.dtypes = dtypes
        self.rounded = rounded
        self.wire = wire_dtype(dtypes, rounded)
        self._parts = lru_cache(maxsize=8)(Routes(plan, ranks.rank).parts)
        self._errors = DeferredErrors(ranks)  # of the step that is under way
        self._targets: Sequence[Tensor] = ()
        self._returning: _Message | None = None  # the last directions that were sent

    def gather(
        self,
        shards: Sequence[Tensor],
        targets: Sequence[Tensor],
        active: tuple[bool, ...],
        directed: tuple[bool, ...],
        errors: DeferredErrors,
    ) -> Iterator[Arrived]:
        """Give this rank's batches one after another; each must go to :meth:`send_back` before the next is asked for.

        Args:
            shards: this rank's contiguous parts of all gradients.
            targets: tensors like these that directions are written to; they may be the same.
            active: for each matrix, whether its blocks go to their owners; the same on every rank.
            directed: for each matrix, whether directions come back; of active ones only, and the same on every rank.
            errors: keeps what fails.
        """
        self._errors, self._targets, self._returning = errors, targets, None
        parts = self._parts(active, directed)
        following: _Message | None = None
        for index, part in enumerate(parts):
            with label("gather"):
                message = following or self._post(part.gradients, shards)
                following = self._post(parts[index + 1].gradients, shards) if index + 1 < len(parts) else None
                arrived = Arrived(part, self._receive(part, message, shards))
            yield arrived
        if self._returning is not None:
            with label("send_back"):
                self._finish(self._returning)
            self._returning = None
        self._targets = ()  # no gradient outlives the program's own

    def send_back(self, arrived: Arrived, directions: Tensor | None) -> None:
        """Send the directions of a batch, (blocks, rows, columns), to whoever holds the gradients.

        Args:
            arrived: what :meth:`gather` gave.
            directions: None if there are none.
        """
        with label("send_back"):
            arrived.gradients = None
            if self._returning is not None:
                self._finish(self._returning)
            way = arrived.part.directions
            rounded = self._errors.attempt(self._round, arrived.part, directions)
            batch = [] if rounded is None else [rounded]
            if way.shared is None:
                self._errors.attempt(way.here.run, batch, self._targets)
                self._returning = self._post(way, batch)
            else:
                self._returning = self._share(way, batch)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _receive(self, part: Part, message: _Message, shards: Sequence[Tensor]) -> Tensor | None:
        """The gradients of this rank's blocks in a batch."""
        gradients = self._errors.attempt(self._gather_here, part, shards) if part.chosen else None
        message.wait()
        if gradients is None:
            return None
        self._errors.attempt(message.write, [gradients])
        return self._errors.attempt(self._round, part, gradients)

    def _gather_here(self, part: Part, shards: Sequence[Tensor]) -> Tensor:
        """Memory for the gradients of a batch, with what this rank holds of them."""
        matrix, block = self.plan.blocks[part.blocks[0]]
        shape = (len(part.blocks), block.rows, block.columns)
        gradients = torch.empty(shape, dtype=self.dtypes[matrix], device=self.devices[matrix])
        part.gradients.here.run(shards, [gradients])
        return gradients

    def _round(self, part: Part, batch: Tensor | None) -> Tensor | None:
        if batch is None or not self.rounded[self.plan.blocks[part.blocks[0]].matrix]:
            return batch
        return batch.to(torch.bfloat16).to(batch.dtype)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _post(self, way: Way, sources: Sequence[Tensor], receive: Tensor | None = None) -> _Message:
        """Start to send what goes from ``sources`` to other ranks, and to receive what they send."""
        if len(self.plan.mates(self.ranks.rank)) == 1:  # nothing travels, on whatever rank
            return _Message(way.unpack, None, self.ranks)
        send = self._errors.attempt(self._pack, way, sources)
        if send is None:
            send = torch.zeros(sum(way.sent), dtype=self.wire, device=self.device)
        if receive is None:
            receive = self._buffer(sum(way.received))
        self.ranks.bytes_sent += send.numel() * send.element_size()
        work = self.ranks.start_all_to_all(receive, send, way.received, way.sent)
        return _Message(way.unpack, work, self.ranks, receive, send)

    def _share(self, way: Way, batch: Sequence[Tensor]) -> _Message:
        """Bring directions to this replica, and start to share what this rank has of them with its twins."""
        assert way.shared is not None
        twins = self.plan.twins.of(self.ranks.rank)
        own, joined = self._buffer(way.shared), self._buffer(way.shared * len(twins))
        self._errors.attempt(way.here.run, batch, [own])
        self._post(way, batch, own[: sum(way.received)]).wait()
        self.ranks.bytes_sent += own.numel() * own.element_size() * (len(twins) - 1)
        return _Message(way.unpack, self.ranks.start_all_gather(joined, own, twins), self.ranks, joined, own)

    def _buffer(self, elements: int) -> Tensor:
        return self._errors.buffer(lambda: torch.empty(elements, dtype=self.wire, device=self.device))

    def _pack(self, way: Way, sources: Sequence[Tensor]) -> Tensor:
        device = sources[0].device if sources else self.device
        packed = torch.empty(sum(way.sent), dtype=self.wire, device=device)
        way.pack.run(sources, [packed])
        return packed.to(self.device)

    def _finish(self, message: _Message) -> None:
        """Wait for directions, and write them to their targets."""
        message.wait()
        self._errors.attempt(message.write, self._targets)


class _Message:
    """Elements that arrive from other ranks, and where they go; without ``work``, none do."""

    def __init__(
        self,
        copies: Copies,
        work: dist.Work | None,
        ranks: Ranks,
        received: Tensor | None = None,
        sent: Tensor | None = None,
    ) -> None:
        self._copies = copies
        self._work = work
        self._ranks = ranks
        self._received = received
        self._sent = sent  # must live until the work is done

    def wait(self) -> None:
        if self._work is not None:
            with self._ranks.explaining():
                self._work.wait()

    def write(self, targets: Sequence[Tensor]) -> None:
        """Put what has arrived into its places in ``targets``."""
        if self._received is not None and self._copies:
            self._copies.run([self._received.to(targets[0].device)], targets)
