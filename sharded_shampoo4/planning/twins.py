"""Ranks with equal shards, one in each replica: the ranks of DDP, or those of HSDP that hold the same part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from .shards import Shard


class Twins:
    """The ranks with the same shards of all matrices as another, for every rank; none, unless each replica has one.

    Twins may get the directions of all replicas from one another, and plans look at one replica only.

    Args:
        shards: for each matrix, those of all ranks.
        world_size: number of ranks.

    Attributes:
        groups: the ranks, twins together; empty if there are none.
    """

    def __init__(self, shards: Sequence[Sequence[Shard]], world_size: int) -> None:
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for rank in range(world_size):
            alike[tuple(of_ranks[rank].elements for of_ranks in shards)].append(rank)
        replicas = [{of_ranks[rank].replica for of_ranks in shards} for rank in range(world_size)]
        everywhere = sorted(set().union(*replicas))
        one_each = all(sorted(n for rank in twins for n in replicas[rank]) == everywhere for twins in alike.values())
        some = len(everywhere) > 1 and one_each and all(len(numbers) == 1 for numbers in replicas)
        self.groups = list(alike.values()) if some else []
        self._of = {rank: twins for twins in self.groups for rank in twins}
        self._replica = {rank: min(replicas[rank]) for rank in self._of}
        self._near = {(twins[0], self._replica[rank]): rank for twins in self.groups for rank in twins}
        self._mates: dict[int, list[int]] = defaultdict(list)
        for rank in sorted(self._of):
            self._mates[self._replica[rank]].append(rank)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def of(self, rank: int) -> list[int]:
        """The twins of a rank, itself among them, in order; empty if there are none."""
        return self._of.get(rank, [])

    def first(self, rank: int) -> int:
        """The first of a rank's twins; ``rank`` itself if there are none."""
        return self._of.get(rank, [rank])[0]

    def mates(self, rank: int) -> list[int]:
        """The ranks of a rank's replica, itself among them, in order."""
        return self._mates[self._replica[rank]]

    def near(self, rank: int, other: int) -> int:
        """The twin of ``rank`` in the replica of ``other``; ``rank`` itself if there are no twins."""
        return self._near[self.first(rank), self._replica[other]] if self else rank
