"""The matrix work of every rank while owners are chosen."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

from .twins import Twins

# The matrix work of every (rank, None), and what of it is refreshed at a phase, of (rank, phase.statistics).
Work = Counter[tuple[int, int | None]]

_SLACK = 1.05  # an owner may be chosen for the rows that it holds while its load stays below this much of the mean


class Loads:
    """The work of every rank, and which ranks have least.

    Args:
        others: the work that they have already, by other plans.
        world_size: number of ranks.
        coming: all work that is to be added.
        twins: of the ranks.
    """

    def __init__(self, others: Work, world_size: int, coming: int, twins: Twins) -> None:
        self.work = Counter(others)
        self._everyone = range(world_size)
        everything = coming + sum(cost for (_, phase), cost in others.items() if phase is None)
        self._limit = _SLACK * everything / world_size
        self._twins = twins
        groups = twins.groups or [[rank] for rank in self._everyone]
        # Heaps of (work, rank): of twins, and of all ranks. What is no longer so is passed over.
        self._heaps = {group[0]: [(self.work[rank, None], rank) for rank in group] for group in groups}
        self._all = [(self.work[rank, None], rank) for rank in self._everyone]
        for heap in (*self._heaps.values(), self._all):
            heapq.heapify(heap)

    def add(self, rank: int, phase: int | None, cost: int) -> None:
        """Count work of a rank, or with a ``phase`` what of it is refreshed then."""
        self.work[rank, phase] += cost
        if phase is None:
            entry = (self.work[rank, None], rank)
            heapq.heappush(self._heaps[self._twins.first(rank)], entry)
            heapq.heappush(self._all, entry)

    def least(self, cost: int, held: Mapping[int, int], phases: Sequence[int]) -> int:
        """The rank that should own a block.

        Args:
            cost: work of the block.
            held: how many of its elements ranks hold; where ranks have twins, those of one replica.
            phases: at which it is refreshed.
        """
        if phases:
            return self._least_busy(cost, held, phases)
        found = []
        for rank, count in held.items():
            work, least = self._first(self._heaps[self._twins.first(rank)])
            if work + cost <= self._limit:
                found.append((-count, work, least))
        return min(found)[-1] if found else self._first(self._all)[1]

    def _least_busy(self, cost: int, held: Mapping[int, int], phases: Sequence[int]) -> int:
        near = [rank for rank in self._everyone if self.work[rank, None] + cost <= self._limit]
        busy = {rank: sum(self.work[rank, phase] for phase in phases) for rank in near}
        count = {rank: held.get(self._twins.first(rank), 0) for rank in self._everyone}
        if near:
            return min(near, key=lambda rank: (busy[rank], -count[rank], self.work[rank, None], rank))
        return min(self._everyone, key=lambda rank: (self.work[rank, None], -count[rank], rank))

    def _first(self, heap: list[tuple[int, int]]) -> tuple[int, int]:
        while heap[0][0] != self.work[heap[0][1], None]:
            heapq.heappop(heap)
        return heap[0]
