"""The work of one step of Shampoo4 in closed form, counted from the library's code, in flops and bytes.

A multiplication and an addition are two flops.

An ordinary step applies roots that are there. For each block of m rows and n columns, in float32:

    2 m^2 n + 2 m n^2        L^(-1/4) G, and that times R^(-1/4)          preconditioner.py, BlockBatch.precondition

and for each quantised factor of order n it reads a root of n ceil(n bits / 8) bytes of codes, 4 n ceil(n / 64) of
scales and 4 n of the diagonal, and writes 4 n^2 bytes of float32 (factors.py, FactorPool._decode). A factor of fewer
than min_quant_numel elements is used as it is.

A refresh step has statistics and roots due besides. For each factor of order n, whose block has k on its other side,
in float64, with rectify_steps = (s, r), (1, 4) by default, and i = refresh_iterations, 1 by default:

    2 n^2 k                  the statistic G G^T                          factors.py, FactorPool.absorb
    4 s n^3                  s steps of Björck: V^T V, V times that       eigenbasis.py, rectify
    4 n^3                    A = V diag V^T + statistic, A V              eigenbasis.py, refresh
    i (8/3 + 2) n^3          i times P = QR(A V), A P                     4/3 n^3 for the reflectors, 4/3 for P
    4 r n^3                  r steps of Björck                            before the root
    2 n^3                    the root V diag V^T                          eigenbasis.py, inverse_root

that is (30 + 2/3) n^3 + 2 n^2 k by default. A factor in float32 has 2 n^2 k, 9 n^3 for eigh (Golub and Van Loan,
Matrix Computations, 8.3) and 2 n^3 for the root. Not counted is what grows with the elements alone: quantising, norms,
copies and the base optimizer. Bytes sent are those of ``estimate_memory(...).traffic``.

With N parameters and square blocks of order b the sums are 4 b N flops in an ordinary step and 65 b N in a refresh:
linear in the parameters and in the order of the blocks, and shared by the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from sharded_shampoo4.factors import factor_layout
from sharded_shampoo4.layout import Block, cut_blocks, matrix_shape
from sharded_shampoo4.memory import shard_all
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.plan import Plan, PlannedMatrix

Shapes = Mapping[str, Sequence[int]]

_QR, _EIGH = 8 / 3, 9  # flops of a factorisation over n^3


class Work(NamedTuple):
    """Of the blocks that one rank owns: flops, but for ``decoded``, bytes read and written by an ordinary step's roots.

    ``ordinary`` is in every step; ``products`` and ``factorisations`` are what a refresh step has besides.
    """

    ordinary: int = 0
    decoded: int = 0
    products: int = 0
    factorisations: float = 0.0

    @property
    def refresh(self) -> float:
        """All that a refresh step has besides."""
        return self.products + self.factorisations


def work_of(blocks: Iterable[Block], options: PreconditionerOptions) -> Work:
    """The sum over ``blocks``, for quantize="eigenbasis" and root="stored"."""
    ordinary = decoded = products = 0
    factorisations = 0.0
    statistics_steps, root_steps = options.rectify_steps
    for block in blocks:
        for order, other in ((block.rows, block.columns), (block.columns, block.rows)):
            ordinary += 2 * order**2 * other
            products += 2 * order**2 * other
            if options.is_quantized(order):
                cubes = 4 * statistics_steps + 4 + 2 * options.refresh_iterations + 4 * root_steps + 2
                products += cubes * order**3
                factorisations += _QR * options.refresh_iterations * order**3
                decoded += _stored_root(order, options) + 4 * order**2
            else:
                products += 2 * order**3
                factorisations += _EIGH * order**3
    return Work(ordinary, decoded, products, factorisations)


def _stored_root(order: int, options: PreconditionerOptions) -> int:
    """Bytes of a quantised inverse root."""
    layout = factor_layout(order, options)
    return sum(math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items() if name.startswith("root"))


def owned_blocks(shapes: Shapes, world_size: int, options: PreconditionerOptions) -> list[list[Block]]:
    """The blocks that each rank owns where all hold whole parameters."""
    sharding = shard_all("ddp", list(map(torch.Size, shapes.values())), world_size, world_size)
    planned = []
    for (name, shape), shards in zip(shapes.items(), sharding.shards, strict=True):
        if matrix := matrix_shape(shape):
            blocks = cut_blocks(matrix, options.max_preconditioner_dim, options.split)
            planned.append(PlannedMatrix(name, matrix, tuple(blocks), shards))
    plan = Plan(planned, world_size)
    owned: list[list[Block]] = [[] for _ in range(world_size)]
    for (_, block), owner in zip(plan.blocks, plan.owners, strict=True):
        owned[owner].append(block)
    return owned


def busiest(shapes: Shapes, world_size: int, options: PreconditionerOptions) -> Work:
    """The work of the rank that has most."""
    everyone = (work_of(blocks, options) for blocks in owned_blocks(shapes, world_size, options))
    return max(everyone, key=lambda work: work.refresh)


def stack(parameters: float) -> tuple[int, int]:
    """Hidden size and layers of a stack like a ViT's with about so many ``parameters``, of 12 h^2 a layer.

    The hidden size is a multiple of 64, about 64 for each layer, as in ViT-S to ViT-L.

    >>> stack(1e6), stack(1e7), stack(1e8)
    ((192, 2), (384, 6), (832, 12))
    """
    hidden = 64 * max(1, round((parameters / 12 / 64**2) ** (1 / 3)))
    return hidden, max(1, round(parameters / (12 * hidden**2)))


def stack_shapes(hidden: int, layers: int) -> dict[str, tuple[int, int]]:
    """Of each layer four square matrices and two of the MLP, by name."""
    layer = {name: (hidden, hidden) for name in ("query", "key", "value", "output")}
    layer |= {"up": (4 * hidden, hidden), "down": (hidden, 4 * hidden)}
    return {f"{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}


def squares(count: int, order: int) -> dict[str, tuple[int, int]]:
    """``count`` matrices of ``order`` rows and columns, by name."""
    return {str(index): (order, order) for index in range(count)}
