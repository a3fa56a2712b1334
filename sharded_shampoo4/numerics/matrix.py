"""A preconditioned parameter: its blocks, their bytes, and at which steps what of it is due."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..options import GraftingScope, PreconditionerOptions
from ..planning.blocks import Block, count_blocks, cut_blocks
from ..planning.plan import PlannedMatrix
from ..planning.schedule import TOGETHER, Intervals, Phase, Phases, intervals_at
from ..planning.shards import Shard
from ..planning.views import matrix_view
from .factors import factor_bytes
from .moments import moments_bytes

# Bytes of factors for an element of their matrix that are worth a warning: twice the states of AdamW, and seven times
# what 4-bit factors of a square matrix take. Such factors in float32 take 16.
COSTLY_BYTES = 16.0
COSTLY_FLOAT32_BYTES = 64.0


@dataclass(eq=False)
class Matrix:
    """A preconditioned parameter and how far its preconditioner has come.

    Attributes:
        dtype: in which directions are computed: float32, or float64 for such parameters.
        step: optimizer steps with a gradient, counted from 1.
        roots: root intervals that have passed; before the first, every inverse root is taken for the identity. With
            method="soap", which has no roots, statistics intervals and the first step.
        phases: steps at which factors are due, where they are staggered.
        parts: rows of each matrix, if the parameter is seen as several.
        whole: shape of the parameter.
    """

    name: str
    shape: tuple[int, int]
    options: PreconditionerOptions
    device: torch.device
    dtype: torch.dtype = torch.float32
    step: int = 0
    roots: int = 0
    phases: Phases = field(default_factory=dict)
    parts: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        whole: Sequence[int],
        options: PreconditionerOptions,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        phases: Phases | None = None,
    ) -> Matrix | None:
        """Return the matrix of a parameter of shape ``whole``; None if it is not preconditioned."""
        view = matrix_view(name, whole, options)
        if view is None:
            return None
        return cls(name, view.shape, options, device, dtype, 0, 0, phases or {}, view.parts, tuple(whole))

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return cut_blocks(self.shape, self.options.cutting, self.parts)

    @functools.cached_property
    def units(self) -> list[int]:
        """Which of the ``parts`` each block is in, counted from 0."""
        if not self.parts:
            return [0] * len(self.blocks)
        ends = list(itertools.accumulate(self.parts))
        return [bisect.bisect_right(ends, block.row) for block in self.blocks]

    @property
    def edges(self) -> list[int]:
        """Where the ``parts`` begin and end in the flattened parameter."""
        rows = itertools.accumulate(self.parts or (self.shape[0],), initial=0)
        return [row * self.shape[1] for row in rows]

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
        """Those in force at this step; no roots with method="soap"."""
        options = self.options
        root = 0 if self.is_soap else options.root_interval
        return intervals_at(self.step, options.statistics_interval, root, options.interval_warmup)

    def like(self, other: Matrix) -> bool:
        """Whether the same factors serve both, at the same steps."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("shape", "parts", "options", "device", "dtype", "phases")
        )

    @property
    def busy(self) -> bool:
        """Whether this step needs the gradient at all."""
        return self.rooted or self.due.statistics or self.due.root

    @property
    def due(self) -> Due:
        """What is due in this step for any of its factors."""
        if self._is_first:
            return Due(statistics=True, root=False, check=True)
        return _due(self.step, self.intervals, self._phases_in_use)

    @functools.cached_property
    def _phases_in_use(self) -> frozenset[Phase]:
        return frozenset(phase for block in self.blocks for phase in self.phases.get(block, TOGETHER))

    def statistics_due(self, block: Block, side: int) -> bool:
        """Whether the left (side 0) or right (1) factor of a block absorbs the gradient in this step."""
        return self._is_first or _is_due(
            self.step, self.intervals.statistics, self.phases.get(block, TOGETHER)[side].statistics
        )

    def root_due(self, block: Block, side: int) -> bool:
        """Whether the left (side 0) or right (1) factor of a block recomputes its root in this step."""
        return _is_due(self.step, self.intervals.root, self.phases.get(block, TOGETHER)[side].root)

    @functools.cached_property
    def factor_bytes(self) -> int:
        """Bytes of all factors of this matrix, without cutting it: it may have very many blocks."""
        return sum(count * self._bytes_of_factors(block) for block, count in self._counts.items())

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all factors and moments of this matrix."""
        return sum(count * self.block_bytes(block) for block, count in self._counts.items())

    @property
    def bytes_per_element(self) -> float:
        """Bytes of all factors for each element of this matrix."""
        return self.factor_bytes / math.prod(self.shape)

    @property
    def is_costly(self) -> bool:
        """Whether the factors cost much more than those of a square matrix of as many elements."""
        longest = max(order for block in self._counts for order in block.orders)
        limit = COSTLY_BYTES if self.options.is_quantized(longest) else COSTLY_FLOAT32_BYTES
        return self.bytes_per_element > limit

    @functools.cached_property
    def _counts(self) -> dict[Block, int]:
        return count_blocks(self.shape, self.options.cutting, self.parts)

    def _bytes_of_factors(self, block: Block) -> int:
        return sum(factor_bytes(order, self.options) for order in block.orders if order)

    def block_bytes(self, block: Block) -> int:
        """Bytes of one block's factors and moments."""
        return self._bytes_of_factors(block) + moments_bytes(block.rows, block.columns, self.options)

    def planned(self, shards: Sequence[Shard]) -> PlannedMatrix:
        """Return what a plan must know of it, where these are the shards of all ranks.

        Blocks stand in one batch if their options, types and devices are equal. Other ranks number devices otherwise.
        """
        device = self.device if len(shards) == 1 else self.device.type
        kind = (self.options, self.dtype, device)
        # With moments a refresh has the bases of all blocks and their rotations in hand.
        scratch = self.options.scratch_on(self.device)
        scratch = max(1, scratch * 3 // 4) if self.is_soap else scratch
        return PlannedMatrix(self.name, self.shape, tuple(self.blocks), tuple(shards), kind, scratch, self.phases)


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
