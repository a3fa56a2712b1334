"""All preconditioners of a rank: parameter matrices, their blocks in equal-shaped batches, and those blocks' factors.

Knows tensors and numbers, not how parameters or gradients are laid out over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..labels import label
from ..options import PreconditionerOptions
from ..planning.blocks import Block
from ..planning.plan import Owned
from .batches import BlockBatch, Refreshed, Sides
from .factors import HEALTH, FactorPool
from .matrix import Matrix
from .moments import MomentPool
from .pool import Pool

Place = tuple[FactorPool, int]  # where a factor is kept
_PoolKey = tuple[PreconditionerOptions, torch.device, int, bool]  # of factors of one order; whether they are alone


class Preconditioner:
    """This rank's factors: those of the blocks in its ``batches``, in pools of equal order."""

    def __init__(self, matrices: Sequence[Matrix], batches: Sequence[Sequence[Owned]]) -> None:
        self.matrices = list(matrices)
        self.batches: list[BlockBatch] = []
        self._places: dict[Owned, tuple[Place | None, Place | None]] = {}  # of a block's left and right factor
        self._moments_of: dict[Owned, tuple[MomentPool | None, int]] = {}
        sizes: dict[_PoolKey, int] = {}
        starts: list[list[tuple[_PoolKey, int] | None]] = []  # of each batch's left and right factors
        for members in batches:
            matrix, block = self.matrices[members[0].matrix], members[0].block
            starts.append([None, None])
            for side, order in enumerate(block.orders):
                if order:
                    key = (matrix.options, matrix.device, order, not matrix.is_soap and 0 in block.orders)
                    starts[-1][side] = key, sizes.get(key, 0)
                    sizes[key] = sizes.get(key, 0) + len(members)

        pools = {key: FactorPool(key[2], count, key[0], key[1], key[3]) for key, count in sizes.items()}
        self.pools = list(pools.values())
        for members, sides in zip(batches, starts, strict=True):
            moments = self._moments(members)
            left, right = (None if side is None else (pools[side[0]], side[1]) for side in sides)
            self.batches.append(BlockBatch(list(members), left, right, moments))
            for offset, owned in enumerate(members):
                self._places[owned] = _moved(left, offset), _moved(right, offset)
                self._moments_of[owned] = moments, offset

    def _moments(self, members: Sequence[Owned]) -> MomentPool | None:
        """The moments of a batch, if it has any."""
        matrix, block = self.matrices[members[0].matrix], members[0].block
        if not matrix.is_soap:
            return None
        return MomentPool((block.rows, block.columns), len(members), matrix.options, matrix.device)

    def refresh(self, number: int, chosen: Sequence[int], gradients: Tensor) -> Refreshed | None:
        """Absorb gradients into the statistics, and recompute the inverse roots, that are due in this step.

        Args:
            number: of a batch.
            chosen: positions in it.
            gradients: of the chosen blocks, (chosen, rows, columns).

        Returns:
            what :meth:`precondition` takes, where it has been computed.
        """
        batch, refreshed = self.batches[number], None
        statistics, both, roots = self._due(batch, chosen)
        if any(both):
            with label("statistics"):
                batch.absorb(chosen, both, gradients, with_roots=True)
        if any(statistics):
            with label("statistics"):
                refreshed = batch.absorb(chosen, statistics, gradients)
        if any(roots):
            with label("roots"):
                batch.invert(chosen, roots)
        return refreshed

    def precondition(
        self, number: int, chosen: Sequence[int], gradients: Tensor, refreshed: Refreshed | None = None
    ) -> Tensor | None:
        """Directions of the ``chosen`` blocks of a batch before grafting, (chosen, rows, columns).

        None before the first roots, where the direction is the gradient.
        """
        batch = self.batches[number]
        if not any(self.matrices[batch.members[position].matrix].rooted for position in chosen):
            return None
        with label("precondition"):
            return batch.precondition(chosen, gradients, refreshed)

    def _due(self, batch: BlockBatch, chosen: Sequence[int]) -> tuple[Sides, Sides, Sides]:
        """Which of the ``chosen`` blocks absorb statistics, which take new roots with them, and which only new roots.

        Each by sides: the blocks whose left factor is due, and those whose right one is.
        """
        found: tuple[Sides, Sides, Sides] = ([], []), ([], []), ([], [])
        for side, fresh in enumerate(batch.roots_are_fresh):
            for k, position in enumerate(chosen):
                index, block = batch.members[position]
                if not block.orders[side]:
                    break  # as in all of them
                matrix = self.matrices[index]
                statistics, root = matrix.statistics_due(block, side), matrix.root_due(block, side)
                both = statistics and root and fresh
                for sides, due in zip(found, (statistics and not both, both, root and not both), strict=True):
                    if due:
                        sides[side].append(k)
        return found

    def failure(self) -> RuntimeError | None:
        """What to say if a factor's statistics or roots have failed ``max_failures`` times in a row.

        Reads the counts from the device, so it is for statistics and root steps only.
        """
        if not any(pool.worst_failures() >= pool.options.max_failures for pool in self.pools):
            return None
        for (index, block), sides in self._places.items():
            for side, (pool, at) in [(("left", "right")[k], place) for k, place in enumerate(sides) if place]:
                failures = int(pool.tensors["failures"][at].max())
                if failures >= pool.options.max_failures:
                    return RuntimeError(
                        f"the {side} preconditioner of {self.matrices[index].name}, block at row {block.row}, column "
                        f"{block.column} ({block.rows} x {block.columns}), failed to update {failures} times in a row "
                        f"(max_failures={pool.options.max_failures}): its gradients or statistics are not finite; "
                        "lower the learning rate, clip gradients or raise matrix_eps"
                    )
        return None

    def health(self) -> dict[str, list[float]]:
        """The worst of each matrix's factors on this rank, in the order of HEALTH."""
        by_pool = {id(pool): pool.health(torch.arange(pool.count, device=pool.device)).tolist() for pool in self.pools}
        worst: dict[str, list[float]] = {}
        for (index, _), sides in self._places.items():
            for pool, at in filter(None, sides):
                name = self.matrices[index].name
                worst[name] = worse(worst.get(name), by_pool[id(pool)][at])
        return worst

    def to_bytes(self, owned: Owned) -> Tensor:
        """The left and the right factor of a block of this rank, and its moments, as uint8."""
        return torch.cat([pool.to_bytes(at) for pool, at in self._kept(owned)])

    def from_bytes(self, owned: Owned, data: Tensor) -> None:
        """Restore what :meth:`to_bytes` gave for a block of the same shape and options."""
        for pool, at in self._kept(owned):
            pool.from_bytes(at, data[: pool.member_bytes])
            data = data[pool.member_bytes :]

    def _kept(self, owned: Owned) -> list[tuple[Pool, int]]:
        """Where all that is kept of a block lies."""
        moments, at = self._moments_of[owned]
        factors: list[tuple[Pool, int]] = list(filter(None, self._places[owned]))
        return factors if moments is None else [*factors, (moments, at)]

    @property
    def nbytes(self) -> int:
        moments = sum(batch.moments.nbytes for batch in self.batches if batch.moments is not None)
        return sum(pool.nbytes for pool in self.pools) + moments


def _moved(place: Place | None, offset: int) -> Place | None:
    return None if place is None else (place[0], place[1] + offset)


def fresh_block(matrix: Matrix, block: Block) -> Tensor:
    """The factors and moments of a block of ``matrix`` before any step, as uint8."""
    owned = Owned(0, block)
    return Preconditioner([matrix], [[owned]]).to_bytes(owned)


def worse(first: list[float] | None, second: list[float]) -> list[float]:
    """Of two factors' health, in the order of HEALTH, the larger errors and failures and the wider range."""
    if first is None:
        return second
    chosen = [min if name == "smallest_eigenvalue" else max for name in HEALTH]
    return [choose(a, b) if a == a and b == b else a + b for choose, a, b in zip(chosen, first, second, strict=True)]
