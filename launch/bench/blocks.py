"""The blocks that Shampoo4 cuts parameters into, and the flops of a step on them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from sharded_shampoo4.planning.blocks import matrix_shape, split_dimension

BLOCK = 1024  # max_preconditioner_dim of method="shampoo"
SOAP_BLOCK = 256  # and of Shampoo4's default
SMALLEST = 4096  # Shampoo4's min_quant_numel

Blocks = Counter[tuple[int, int]]  # how many there are of each number of rows and columns


def blocks_of(shapes: Iterable[Sequence[int]], limit: int = BLOCK) -> Blocks:
    """Count the blocks of at most ``limit`` rows and columns of all parameters that are matrices.

    >>> blocks_of([(2500, 30), (1, 6, 4, 5), (7,)])
    Counter({(833, 30): 2, (834, 30): 1, (6, 20): 1})
    """
    blocks: Blocks = Counter()
    for matrix in filter(None, map(matrix_shape, shapes)):
        blocks.update(itertools.product(*(split_dimension(side, limit, "aligned") for side in matrix)))
    return blocks


def orders_of(blocks: Blocks) -> Counter[int]:
    """Count the factors of each order: a block has two, of its rows and of its columns."""
    orders: Counter[int] = Counter()
    for sides, count in blocks.items():
        for side in sides:
            orders[side] += count
    return orders


def step_flops(blocks: Blocks) -> dict[str, float]:
    """Count the flops of steps with method="shampoo" and its default options, all in float32.

    A multiplication and an addition are two flops.

    Returns:
        ``"ordinary"``: the products L^(-1/4) G R^(-1/4) of every block. ``"refresh"``: what a step with statistics and
        roots takes besides. For a factor of order n, whose block has k on its other side:

            2 n^2 k         the statistic G G^T
            4 n^3           a Bjorck step before it
            4 n^3           A = V diag(d) V^T + statistic, and A V
            (8/3 + 2) n^3   P = QR(A V), and A P
            8 n^3           two Bjorck steps before the root
            2 n^3           the root V diag V^T

        A factor of fewer than 4096 elements takes 2 n^2 k, 9 n^3 for eigh and 2 n^3. Quantization, norms, copies and
        the base optimizer are not counted: they grow with the number of elements only.
    """
    ordinary = refresh = 0.0
    for (rows, columns), count in blocks.items():
        ordinary += count * 2 * rows * columns * (rows + columns)
        for order, other in ((rows, columns), (columns, rows)):
            cubes = 4 + 4 + 8 / 3 + 2 + 8 + 2 if order**2 >= SMALLEST else 9 + 2
            refresh += count * (2 * order**2 * other + cubes * order**3)
    return {"ordinary": ordinary, "refresh": refresh}
