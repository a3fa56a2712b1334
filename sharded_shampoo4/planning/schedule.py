"""At which steps factors are due: all of them at the same, as in the paper, or each at its own, so that no step stalls.

Integers only. What is decided here touches numbers, so it follows from the shapes and options of all parameters, and
never from who holds or owns them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..options import PreconditionerOptions
from .blocks import Block, cut_blocks
from .views import View


class Phase(NamedTuple):
    """The steps of a factor: ``statistics`` modulo statistics_interval, and ``root`` modulo root_interval."""

    statistics: int = 0
    root: int = 0


_FIRST = 5  # step of the first statistics while intervals grow


class Intervals(NamedTuple):
    """Steps from one statistics update to the next, and from one root to the next; ``root`` 0: none yet."""

    statistics: int
    root: int


@functools.lru_cache(maxsize=4096)
def intervals_at(step: int, statistics: int, root: int, warmup: bool) -> Intervals:
    """The intervals in force at a ``step``, of those that were asked for; with ``root`` 0 there are no roots.

    With ``warmup`` they begin at 5 steps and double until they are what was asked for: statistics as long as four
    intervals have not passed, roots after 5, 10, 20, 40 steps and so on. So the first statistics are of step 5 and the
    first roots of step 10.

    >>> [intervals_at(step, 100, 500, True) for step in (5, 10, 100, 499, 500)]
    [Intervals(statistics=5, root=0), Intervals(statistics=5, root=5), Intervals(statistics=20, root=80), \
Intervals(statistics=100, root=320), Intervals(statistics=100, root=500)]
    """
    if not warmup:
        return Intervals(statistics, root)
    every = statistics if step >= 4 * statistics else min(statistics, _doubled(step // 4))
    if step >= root or root <= 2 * _FIRST:
        return Intervals(every, root)
    return Intervals(every, min(root, _doubled(step - 1)) if step > _FIRST else 0)


def _doubled(limit: int) -> int:
    """The largest of 5, 10, 20, 40 and so on that is at most ``limit``; 5 where none is."""
    interval = _FIRST
    while 2 * interval <= limit:
        interval *= 2
    return interval


def first_root(options: PreconditionerOptions) -> int:
    """The step at which directions begin."""
    if options.method == "soap":
        return 1
    if options.interval_warmup:
        return min(options.root_interval, 2 * _FIRST)
    return options.root_interval


# The phases of a matrix's left and right factors, by blocks. Blocks that are not there have phase 0.
Phases = Mapping[Block, tuple[Phase, Phase]]
TOGETHER = (Phase(), Phase())


def stagger(matrices: Sequence[tuple[View, PreconditionerOptions]]) -> list[Phases]:
    """Spread the factors of ``matrices``, those with refresh="staggered", over their intervals.

    Costly factors first, each takes the steps at which least is due so far. Its roots are in steps of its statistics.
    """
    found: list[dict[Block, list[Phase]]] = [{} for _ in matrices]
    by_intervals: dict[tuple[int, int], list[tuple[int, int, int, Block, int]]] = {}
    for index, (view, options) in enumerate(matrices):
        if options.refresh != "staggered":
            continue
        intervals = (options.statistics_interval, options.root_interval)
        for block in cut_blocks(view.shape, options.cutting, view.parts):
            found[index][block] = [Phase(), Phase()]
            for side, order in enumerate(block.orders):
                if order:
                    by_intervals.setdefault(intervals, []).append((*_work(order, options), index, block, side))
    for intervals, factors in by_intervals.items():
        calendar = _Calendar(*intervals)
        factors.sort(key=lambda factor: -factor[0] - factor[1])  # stable
        for statistics, root, index, block, side in factors:
            found[index][block][side] = calendar.place(statistics, root)
    return [{block: _of_both(block, *phases) for block, phases in blocks.items()} for blocks in found]


def _of_both(block: Block, left: Phase, right: Phase) -> tuple[Phase, Phase]:
    """The phases of both sides; a side without factors takes that of the other."""
    return left if block.left else right, right if block.right else left


def _work(order: int, options: PreconditionerOptions) -> tuple[int, int]:
    """What the statistics and the root of a factor cost.

    Cubes are for products and factorizations; squares for quantization, which takes as long as products with 128
    columns do (measured on CPUs).
    """
    if options.method == "soap":
        return order**2 * (order + 128), 0
    if not options.is_quantized(order) or options.quantize != "eigenbasis":
        return order**2, order**3  # eigh; statistics are a product only
    cost = order**2 * (order + 128)
    return cost, {"stored": cost // 4, "rectified": cost, "implicit": 0}[options.root]


class _Calendar:
    """What is due at which steps modulo ``every``, and which roots in which of the intervals of a root interval."""

    def __init__(self, every: int, root_every: int) -> None:
        self.every, self.root_every = every, root_every
        self.statistics = [0] * every
        self.roots = [[0] * max(1, root_every // every) for _ in range(every)]

    def place(self, statistics: int, root: int) -> Phase:
        """Enter a factor where the fullest of its steps is least full."""

        def peaks(phase: int) -> tuple[int, int]:
            roots = self.roots[phase]
            done = self.statistics[phase] + statistics
            return done + max(*roots, min(roots) + root), done + min(roots)

        phase = min(range(self.every), key=peaks)
        turn = min(range(len(self.roots[phase])), key=self.roots[phase].__getitem__)
        self.statistics[phase] += statistics
        self.roots[phase][turn] += root
        return Phase(phase, (phase + turn * self.every) % self.root_every)
