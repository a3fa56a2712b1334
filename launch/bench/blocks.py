"""The blocks that Shampoo4 cuts parameters into, and the flops of a step on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.planning.blocks import Block, count_blocks
from sharded_shampoo4.planning.views import matrix_view

BLOCK = 1024  # max_preconditioner_dim of method="shampoo"
SOAP_BLOCK = 256  # and of Shampoo4's default
SMALLEST = 4096  # Shampoo4's min_quant_numel

Blocks = Counter[Block]  # how many there are of each size and with which factors; places are 0


def blocks_of(shapes: Iterable[Sequence[int]], limit: int = BLOCK, **options: Any) -> Blocks:
    """Count the blocks of at most ``limit`` rows and columns of all parameters that are matrices.

    Other ``options`` are those of Shampoo4.

    >>> {(block.rows, block.columns): count for block, count in blocks_of([(2500, 500), (6, 4, 5, 1), (7,)]).items()}
    {(896, 500): 1, (832, 500): 1, (772, 500): 1, (6, 20): 1}
    """
    chosen = PreconditionerOptions(max_preconditioner_dim=limit, **options)
    blocks: Blocks = Counter()
    for view in [matrix_view("", shape, chosen) for shape in shapes]:
        if view is not None:
            blocks.update(count_blocks(view.shape, chosen.cutting, view.parts))
    return blocks


def orders_of(blocks: Blocks) -> Counter[int]:
    """Count the factors of each order: a block has up to two, of its rows and of its columns."""
    orders: Counter[int] = Counter()
    for block, count in blocks.items():
        for order in filter(None, block.orders):
            orders[order] += count
    return orders


def step_flops(blocks: Blocks, method: str = "soap") -> dict[str, float]:
    """Count the flops of steps with the default options of ``method``, all in float32.

    A multiplication and an addition are two flops.

    Returns:
        ``"ordinary"``: the products of every block that make a direction, V^T G V and back, or L^(-1/4) G R^(-1/4) with
        ``method="shampoo"``. ``"refresh"``: what a step that refreshes everything takes besides. For a factor of order
        n, whose block has k on its other side:

            2 n^2 k         the statistic G G^T
            8/3 n^3         P = QR(A V), where A = V diag(d) V^T + statistic
            6 n^3           "soap": the statistic's products with V and P, and the rotation P^T V
            4 n^2 k         "soap": both moments in the new basis
            6 n^3           "shampoo": A, A V and A P
            4 n^3           "shampoo": a Bjorck step before the statistic
            2 n^3           "shampoo": the root V diag V^T, of the new eigenbasis

        With ``method="shampoo"`` a factor of fewer than 4096 elements takes 2 n^2 k, 9 n^3 for eigh and 2 n^3.
        Quantization, norms, copies and the base optimizer are not counted: they grow with the number of elements only.
    """
    ordinary = refresh = 0.0
    for block, count in blocks.items():
        for order in block.orders:
            products, cube = count * block.rows * block.columns * order, count * order**3
            if method == "soap":
                ordinary += 4 * products
                refresh += 6 * products + (8 / 3 + 6) * cube
            else:
                ordinary += 2 * products
                refresh += 2 * products + (8 / 3 + 6 + 4 + 2 if order**2 >= SMALLEST else 9 + 2) * cube
    return {"ordinary": ordinary, "refresh": refresh}
