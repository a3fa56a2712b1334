"""At which steps factors are due: all of them at the same, as in the paper, or each at its own, so that no step stalls.

Integers only. What is decided here touches numbers, so it follows from the shapes and options of all parameters, and
never from who holds or owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .layout import Block, cut_blocks
from .options import PreconditionerOptions


class Phase(NamedTuple):
    """The steps of a factor: ``statistics`` modulo statistics_interval, and ``root`` modulo root_interval."""

    statistics: int = 0
    root: int = 0


# The phases of a matrix's left and right factors, by blocks. Blocks that are not there have phase 0.
Phases = Mapping[Block, tuple[Phase, Phase]]
TOGETHER = (Phase(), Phase())


def stagger(matrices: Sequence[tuple[tuple[int, int], PreconditionerOptions]]) -> list[Phases]:
    """Spread the factors of ``matrices``, those with refresh="staggered", over their intervals.

    Costly factors first, each takes the step at which least is due so far. A factor's first root is never before its
    first statistics; where root_interval is a multiple of statistics_interval, roots follow statistics at once.
    """
    found: list[dict[Block, list[Phase]]] = [{} for _ in matrices]
    by_intervals: dict[tuple[int, int], list[tuple[int, int, Block, int]]] = {}
    for index, (shape, options) in enumerate(matrices):
        if options.refresh != "staggered":
            continue
        intervals = (options.statistics_interval, options.root_interval)
        for block in cut_blocks(shape, options.max_preconditioner_dim, options.split):
            found[index][block] = [Phase(), Phase()]
            for side, order in enumerate((block.rows, block.columns)):
                by_intervals.setdefault(intervals, []).append((order**3, index, block, side))
    for (every, root_every), factors in by_intervals.items():
        statistics = [0] * every
        roots = [[0] * max(1, root_every // every) for _ in range(every)]
        for cost, index, block, side in sorted(factors, key=lambda factor: -factor[0]):  # stable
            phase = min(range(every), key=statistics.__getitem__)
            turn = min(range(len(roots[phase])), key=roots[phase].__getitem__)
            statistics[phase] += cost
            roots[phase][turn] += cost
            found[index][block][side] = Phase(phase, (phase + turn * every) % root_every)
    return [{block: (left, right) for block, (left, right) in blocks.items()} for blocks in found]
