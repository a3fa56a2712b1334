"""The blocks that Shampoo4 cuts parameters into, by its documented rule, and the flops of a step on them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

BLOCK = 1024  # Shampoo4's max_preconditioner_dim
SMALLEST = 4096  # Shampoo4's min_quant_numel

Blocks = Counter[tuple[int, int]]  # how many there are of each number of rows and columns


def blocks_of(shapes: Iterable[Sequence[int]], limit: int = BLOCK) -> Blocks:
    """Cut every parameter that has a matrix view into blocks of at most ``limit`` rows and columns.

    Sides of 1 are dropped and the others flattened to (first, rest); a side is cut into parts of about equal size.

    >>> blocks_of([(2500, 30), (1, 6, 4, 5), (7,)])
    Counter({(833, 30): 2, (834, 30): 1, (6, 20): 1})
    """
    blocks: Blocks = Counter()
    for shape in shapes:
        sides = [side for side in shape if side != 1]
        if len(sides) > 1:
            blocks.update(itertools.product(*(_parts(side, limit) for side in (sides[0], math.prod(sides[1:])))))
    return blocks


def _parts(side: int, limit: int) -> list[int]:
    parts = -(-side // limit)
    small, larger = divmod(side, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def orders_of(blocks: Blocks) -> Counter[int]:
    """Count the factors of each order: a block has two, of its rows and of its columns."""
    orders: Counter[int] = Counter()
    for sides, count in blocks.items():
        for side in sides:
            orders[side] += count
    return orders


def step_flops(blocks: Blocks) -> dict[str, float]:
    """Count the flops of Shampoo4's steps with its default options, a multiplication and an addition being two.

    ``"ordinary"``, in float32: L^(-1/4) G R^(-1/4) of every block. ``"refresh"``, in float64, is what a step with
    statistics and roots has besides. For a factor of order n, whose block has k on its other side:

        2 n^2 k         the statistic G G^T
        4 n^3           a Bjorck step before it
        4 n^3           A = V diag(d) V^T + statistic, and A V
        (8/3 + 2) n^3   P = QR(A V), and A P
        16 n^3          four Bjorck steps before the root
        2 n^3           the root V diag V^T

    A factor of fewer than 4096 elements has 2 n^2 k, 9 n^3 for eigh and 2 n^3. Not counted is what grows with the
    elements alone: quantization, norms, copies and the base optimizer.
    """
    ordinary = refresh = 0.0
    for (rows, columns), count in blocks.items():
        ordinary += count * 2 * rows * columns * (rows + columns)
        for order, other in ((rows, columns), (columns, rows)):
            cubes = 4 + 4 + 8 / 3 + 2 + 16 + 2 if order**2 >= SMALLEST else 9 + 2
            refresh += count * (2 * order**2 * other + cubes * order**3)
    return {"ordinary": ordinary, "refresh": refresh}
