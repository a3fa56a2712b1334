"""All preconditioners of a rank: parameter matrices, their blocks in equal-shaped batches, and those blocks' factors.

Knows tensors and numbers, not how parameters or gradients are laid out over ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..labels import label
from ..options import GraftingScope, PreconditionerOptions
from ..planning.blocks import Block, Shard, count_parts, cut_blocks
from ..planning.plan import Owned, PlannedMatrix
from ..planning.schedule import TOGETHER, Intervals, Phase, Phases, intervals_at
from . import linalg
from .factors import HEALTH, FactorPool, factor_bytes
from .moments import MomentPool, Turn, moments_bytes
from .pool import Index, Pool

# Bytes of factors for an element of their matrix that are worth a warning: twice the states of AdamW, and seven times
# what 4-bit factors of a square matrix take. Such factors in float32 take 16.
COSTLY_BYTES = 16.0
COSTLY_FLOAT32_BYTES = 64.0

Place = tuple[FactorPool, int]  # where a factor is kept
_PoolKey = tuple[PreconditionerOptions, torch.device, int]


@dataclass(eq=False)
class Matrix:
    """A preconditioned parameter and how far its preconditioner has come.

    Attributes:
        dtype: in which directions are computed: float32, or float64 for such parameters.
        step: optimizer steps with a gradient, counted from 1.
        roots: root intervals that have passed; before the first, every inverse root is taken for the identity. With
            method="soap", which has no roots, statistics intervals and the first step.
        phases: steps at which factors are due, where they are staggered.
    """

    name: str
    shape: tuple[int, int]
    options: PreconditionerOptions
    device: torch.device
    dtype: torch.dtype = torch.float32
    step: int = 0
    roots: int = 0
    phases: Phases = field(default_factory=dict)

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return cut_blocks(self.shape, self.options.max_preconditioner_dim, self.options.split)

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        if self.is_soap:
            self.roots += self._is_first or _is_due(self.step, self.intervals.statistics)
        else:
            self.roots += _is_due(self.step, self.intervals.root)

    @property
    def is_soap(self) -> bool:
        """Whether the blocks keep moments, and the base optimizer nothing of this parameter."""
        return self.options.method == "soap"

    @property
    def grafting(self) -> GraftingScope:
        """Whose norm directions take: nobody's with method="soap"."""
        return "none" if self.is_soap else self.options.grafting

    @property
    def _is_first(self) -> bool:
        """Whether this is the first step of method="soap", in which all factors take the gradient's eigenbases."""
        return self.is_soap and self.step == 1

    @property
    def rooted(self) -> bool:
        """Whether directions are preconditioned."""
        return self.roots > 0

    @property
    def intervals(self) -> Intervals:
        """Those in force at this step."""
        options = self.options
        return intervals_at(self.step, options.statistics_interval, options.root_interval, options.interval_warmup)

    def like(self, other: Matrix) -> bool:
        """Whether the same factors serve both, at the same steps."""
        return (self.shape, self.options, self.device, self.dtype, self.phases) == (
            other.shape,
            other.options,
            other.device,
            other.dtype,
            other.phases,
        )

    @property
    def busy(self) -> bool:
        """Whether this step needs the gradient at all."""
        return self.rooted or self.due.statistics or self.due.root

    @property
    def due(self) -> Due:
        """What is due in this step for any of its factors."""
        if self.is_soap:
            found = _due(self.step, self.intervals._replace(root=0), self._phases_in_use)
            return Due(True, False, True) if self._is_first else found
        return _due(self.step, self.intervals, self._phases_in_use)

    @functools.cached_property
    def _phases_in_use(self) -> frozenset[Phase]:
        return frozenset(phase for block in self.blocks for phase in self.phases.get(block, TOGETHER))

    def statistics_due(self, block: Block, side: int) -> bool:
        """Whether the left (side 0) or right (1) factor of a block absorbs the gradient in this step."""
        return self._is_first or _is_due(self.step, self.intervals.statistics, self.phases.get(block, TOGETHER)[side].statistics)

    def root_due(self, block: Block, side: int) -> bool:
        """Whether the left (side 0) or right (1) factor of a block recomputes its root in this step."""
        return not self.is_soap and _is_due(self.step, self.intervals.root, self.phases.get(block, TOGETHER)[side].root)

    @functools.cached_property
    def factor_bytes(self) -> int:
        """Bytes of all factors of this matrix, without cutting it: it may have very many blocks."""
        rows, columns = self._parts
        left = sum(count * factor_bytes(order, self.options) for order, count in rows)
        right = sum(count * factor_bytes(order, self.options) for order, count in columns)
        return left * sum(count for _, count in columns) + right * sum(count for _, count in rows)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all factors and moments of this matrix."""
        rows, columns = self._parts
        moments = sum(m * n * moments_bytes(row, column, self.options) for row, m in rows for column, n in columns)
        return self.factor_bytes + moments

    @property
    def bytes_per_element(self) -> float:
        """Bytes of all factors for each element of this matrix."""
        return self.factor_bytes / math.prod(self.shape)

    @property
    def is_costly(self) -> bool:
        """Whether the factors cost much more than those of a square matrix of as many elements."""
        longest = max(order for side in self._parts for order, _ in side)
        limit = COSTLY_BYTES if self.options.is_quantized(longest) else COSTLY_FLOAT32_BYTES
        return self.bytes_per_element > limit

    @functools.cached_property
    def _parts(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Into how many parts of which sizes the rows and the columns are cut."""
        limit, split = self.options.max_preconditioner_dim, self.options.split
        rows, columns = (count_parts(size, limit, split) for size in self.shape)
        return rows, columns

    def block_bytes(self, block: Block) -> int:
        """Bytes of one block's factors and moments."""
        factors = factor_bytes(block.rows, self.options) + factor_bytes(block.columns, self.options)
        return factors + moments_bytes(block.rows, block.columns, self.options)

    def planned(self, shards: Sequence[Shard]) -> PlannedMatrix:
        """Return what a plan must know of it, where these are the shards of all ranks.

        Blocks stand in one batch if their options, types and devices are equal. Other ranks number devices otherwise.
        """
        device = self.device if len(shards) == 1 else self.device.type
        kind = (self.options, self.dtype, device)
        return PlannedMatrix(
            self.name, self.shape, tuple(self.blocks), tuple(shards), kind, self.options.scratch_mib, self.phases
        )


def fresh_block(matrix: Matrix, block: Block) -> Tensor:
    """The factors and moments of a block of ``matrix`` before any step, as uint8."""
    owned = Owned(0, block)
    return Preconditioner([matrix], [[owned]]).to_bytes(owned)


class Due(NamedTuple):
    """What a step has to do.

    Attributes:
        statistics: whether any factor absorbs the gradient.
        root: whether any factor recomputes its inverse root.
        check: whether an interval ends, when failures are looked for.
    """

    statistics: bool
    root: bool
    check: bool

    @classmethod
    def any(cls, matrices: Iterable[Matrix]) -> Due:
        """What is due for any of ``matrices``."""
        found = {matrix.due for matrix in matrices}
        return cls(*(any(due[kind] for due in found) for kind in range(3)))


@functools.lru_cache(maxsize=256)
def _due(step: int, intervals: Intervals, phases: frozenset[Phase]) -> Due:
    return Due(
        any(_is_due(step, intervals.statistics, phase.statistics) for phase in phases),
        any(_is_due(step, intervals.root, phase.root) for phase in phases),
        _is_due(step, intervals.statistics) or _is_due(step, intervals.root),
    )


def _is_due(step: int, interval: int, phase: int = 0) -> bool:
    return interval > 0 and (step - phase) % interval == 0


def worse(first: list[float] | None, second: list[float]) -> list[float]:
    """Of two factors' health, in the order of HEALTH, the larger errors and failures and the wider range."""
    if first is None:
        return second
    chosen = [min if name == "smallest_eigenvalue" else max for name in HEALTH]
    return [choose(a, b) if a == a and b == b else a + b for choose, a, b in zip(chosen, first, second, strict=True)]


Sides = tuple[list[int], list[int]]  # which of some blocks' left factors, and which of their right factors


class Refreshed(NamedTuple):
    """What a refresh leaves for the directions of the same step: bases, eigenvectors as columns, and the momentum."""

    left: Tensor  # (k, rows, rows)
    right: Tensor  # (k, columns, columns)
    momentum: Tensor  # (k, rows, columns)


class BlockBatch:
    """Equal-shaped blocks whose left factors are neighbors in one pool and right factors in another (or the same).

    ``moments`` are those of the blocks, with method="soap".
    """

    def __init__(
        self,
        members: list[Owned],
        left: FactorPool,
        left_start: int,
        right: FactorPool,
        right_start: int,
        moments: MomentPool | None,
    ) -> None:
        self.members = members
        self.left, self.left_start = left, left_start
        self.right, self.right_start = right, right_start
        self.moments = moments
        self._whole = (
            slice(left_start, left_start + len(members)),
            slice(right_start, right_start + len(members)),
        )

    def absorb(self, chosen: Sequence[int], due: Sides, gradients: Tensor) -> Refreshed | None:
        """Statistics step of those of the ``chosen`` members that are ``due``, by sides.

        ``gradients`` (k, rows, columns) are those of the chosen ones. Moments follow their bases: the new ones are
        returned then.
        """
        old = None if self.moments is None else self.bases(chosen, gradients.dtype)
        left, right = self._due(chosen, due)
        of_left, of_right = (_some(gradients, which) for which in due)
        changed: list[Tensor | None] = [None, None]
        if self.left is self.right:
            both = self.left.absorb(torch.cat([left, right]), torch.cat([of_left, of_right.mT]))
            changed = list(both.split([len(left), len(right)]))
        else:
            if due[0]:
                changed[0] = self.left.absorb(left, of_left)
            if due[1]:
                changed[1] = self.right.absorb(right, of_right.mT)
        if self.moments is None or old is None:
            return None
        new = self.bases(chosen, gradients.dtype)
        turns = [
            Turn(side, index_tensor(which, gradients.device), _some(old[side], which), _some(new[side], which), kept)
            for side, (which, kept) in enumerate(zip(due, changed, strict=True))
            if kept is not None and which
        ]
        return Refreshed(*new, self.moments.rotate(self._run(chosen), turns, gradients.dtype))

    def invert(self, chosen: Sequence[int], due: Sides) -> None:
        """Root step of those of the ``chosen`` members that are ``due``, by sides."""
        left, right = self._due(chosen, due)
        if self.left is self.right:
            self.left.invert(torch.cat([left, right]))
            return
        if due[0]:
            self.left.invert(left)
        if due[1]:
            self.right.invert(right)

    def precondition(
        self, chosen: Sequence[int], gradients: Tensor, steps: Sequence[int], refreshed: Refreshed | None
    ) -> Tensor:
        """Directions of the ``chosen`` members, before grafting: (k, rows, columns).

        L^(-1/4) G R^(-1/4), or with moments V_L X V_R^T, where X is what Adam makes of V_L^T G V_R. ``steps`` are the
        members' counts of steps; ``refreshed`` what :meth:`absorb` has returned in this step, if it was called.
        """
        dtype = getattr(torch, self.left.options.matmul_dtype) if gradients.dtype == torch.float32 else gradients.dtype
        if self.moments is None:
            left, right = self._runs(chosen)
            half = self.left.root(left, dtype).left_of(gradients.to(dtype))
            return self.right.root(right, dtype).right_of(half).to(gradients.dtype)
        bases = refreshed[:2] if refreshed else self.bases(chosen, gradients.dtype)
        left_basis, right_basis = (basis.to(dtype) for basis in bases)
        projected = linalg.matmul(linalg.matmul(left_basis.mT, gradients.to(dtype)), right_basis).to(gradients.dtype)
        momentum = refreshed.momentum if refreshed else None
        directions = self.moments.direct(self._run(chosen), projected, steps, momentum).to(dtype)
        return linalg.matmul(linalg.matmul(left_basis, directions), right_basis.mT).to(gradients.dtype)

    def bases(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rectified eigenbases of the ``chosen`` members, (k, rows, rows) and (k, columns, columns)."""
        left, right = self._runs(chosen)
        return self.left.basis(left, dtype), self.right.basis(right, dtype)

    def _due(self, chosen: Sequence[int], due: Sides) -> tuple[Tensor, Tensor]:
        """The places in the pools of the left and the right factors that are due."""
        left, right = (index_tensor([chosen[k] for k in which], self.left.device) for which in due)
        return left + self.left_start, right + self.right_start

    def _positions(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions = index_tensor(chosen, self.left.device)
        return positions + self.left_start, positions + self.right_start

    def _runs(self, chosen: Sequence[int]) -> tuple[Index, Index]:
        """Like :meth:`_positions`, but as slices where all members are chosen: views instead of copies."""
        return self._positions(chosen) if len(chosen) < len(self.members) else self._whole

    def _run(self, chosen: Sequence[int]) -> Index:
        """The places of the chosen members' moments."""
        everyone = len(chosen) == len(self.members)
        return slice(0, len(self.members)) if everyone else index_tensor(chosen, self.left.device)


def _some(gradients: Tensor, which: Sequence[int]) -> Tensor:
    return gradients if len(which) == len(gradients) else gradients[index_tensor(which, gradients.device)]


def index_tensor(positions: Sequence[int], device: torch.device) -> Tensor:
    """``positions`` on ``device``; remembered, so that steps that are alike copy nothing from the host."""
    return _index_tensor(tuple(positions), device)


@functools.lru_cache(maxsize=2**14)
def _index_tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64, device=device)


class Preconditioner:
    """This rank's factors: those of the blocks in its ``batches``, in pools of equal order."""

    def __init__(self, matrices: Sequence[Matrix], batches: Sequence[Sequence[Owned]]) -> None:
        self.matrices = list(matrices)
        self.batches: list[BlockBatch] = []
        self._places: dict[Owned, tuple[Place, Place]] = {}  # of a block: its left and its right factor
        self._moments_of: dict[Owned, tuple[MomentPool | None, int]] = {}
        sizes: dict[_PoolKey, int] = {}
        starts: list[tuple[tuple[_PoolKey, int], tuple[_PoolKey, int]]] = []
        for members in batches:
            matrix, block = self.matrices[members[0].matrix], members[0].block
            sides = []
            for order in (block.rows, block.columns):
                key = (matrix.options, matrix.device, order)
                sides.append((key, sizes.get(key, 0)))
                sizes[key] = sides[-1][1] + len(members)
            starts.append((sides[0], sides[1]))

        pools = {key: FactorPool(key[2], count, key[0], key[1]) for key, count in sizes.items()}
        self.pools = list(pools.values())
        for members, ((left, left_start), (right, right_start)) in zip(batches, starts, strict=True):
            moments = self._moments(members)
            self.batches.append(BlockBatch(list(members), pools[left], left_start, pools[right], right_start, moments))
            for offset, owned in enumerate(members):
                self._places[owned] = (pools[left], left_start + offset), (pools[right], right_start + offset)
                self._moments_of[owned] = moments, offset

    def _moments(self, members: Sequence[Owned]) -> MomentPool | None:
        """The moments of a batch, if it has any."""
        matrix, block = self.matrices[members[0].matrix], members[0].block
        if not matrix.is_soap:
            return None
        return MomentPool((block.rows, block.columns), len(members), matrix.options, matrix.device)

    def absorb(self, number: int, chosen: Sequence[int], gradients: Tensor) -> Refreshed | None:
        """Absorb gradients into the statistics that are due in this step.

        Args:
            number: of a batch.
            chosen: positions in it.
            gradients: of the chosen blocks, (chosen, rows, columns).

        Returns:
            what :meth:`precondition` takes, where it has been computed.
        """
        due = self._sides(number, chosen, Matrix.statistics_due)
        if not any(due):
            return None
        with label("statistics"):
            return self.batches[number].absorb(chosen, due, gradients)

    def invert(self, number: int, chosen: Sequence[int]) -> None:
        """Recompute the inverse roots of the ``chosen`` blocks of a batch that are due in this step."""
        due = self._sides(number, chosen, Matrix.root_due)
        if any(due):
            with label("roots"):
                self.batches[number].invert(chosen, due)

    def precondition(
        self, number: int, chosen: Sequence[int], gradients: Tensor, refreshed: Refreshed | None = None
    ) -> Tensor | None:
        """Directions of the ``chosen`` blocks of a batch before grafting, (chosen, rows, columns).

        None before the first roots, where the direction is the gradient.
        """
        batch = self.batches[number]
        matrices = [self.matrices[batch.members[position].matrix] for position in chosen]
        if not any(matrix.rooted for matrix in matrices):
            return None
        with label("precondition"):
            return batch.precondition(chosen, gradients, [matrix.step for matrix in matrices], refreshed)

    def _sides(self, number: int, chosen: Sequence[int], is_due: Callable[[Matrix, Block, int], bool]) -> Sides:
        """Which of the ``chosen`` blocks of a batch have a left factor that is due, and which a right one."""
        members = [self.batches[number].members[position] for position in chosen]

        def due(side: int) -> list[int]:
            return [k for k, (index, block) in enumerate(members) if is_due(self.matrices[index], block, side)]

        return due(0), due(1)

    def failure(self) -> RuntimeError | None:
        """What to say if a factor's statistics or roots have failed ``max_failures`` times in a row.

        Reads the counts from the device, so it is for statistics and root steps only.
        """
        if not any(pool.worst_failures() >= pool.options.max_failures for pool in self.pools):
            return None
        for (index, block), sides in self._places.items():
            for side, (pool, at) in zip(("left", "right"), sides, strict=True):
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
            for pool, at in sides:
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
        return [*self._places[owned], *([] if moments is None else [(moments, at)])]

    @property
    def nbytes(self) -> int:
        moments = sum(batch.moments.nbytes for batch in self.batches if batch.moments is not None)
        return sum(pool.nbytes for pool in self.pools) + moments
