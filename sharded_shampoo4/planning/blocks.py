"""Which parameters are matrices and how they are cut into blocks: integers only, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_ALIGNED = (64, 32, 16, 8)  # elements: tiles of matrix products, on GPUs and in the caches of CPUs
_LONGEST_KERNEL = 11  # of convolutions in one dimension, as far as they are usual


class Shard(NamedTuple):
    """The elements ``start`` to ``stop`` of a flattened (row-major) parameter, which a rank holds.

    ``replica`` tells the complete copies of the parameter apart: all shards of one replica together tile it. It is 0
    where there is only one copy, and the rank where every rank holds everything. An empty shard is from 0 to 0.
    """

    start: int
    stop: int
    replica: int = 0

    @property
    def length(self) -> int:
        """How many elements it has."""
        return self.stop - self.start


def make_shard(start: int, stop: int, replica: int = 0) -> Shard:
    """Return a shard from ``start`` to ``stop``; from 0 to 0 if it has no elements."""
    return Shard(start, stop, replica) if stop > start else Shard(0, 0, replica)


class Block(NamedTuple):
    """A rectangle of a parameter matrix: ``matrix[row : row + rows, column : column + columns]``."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """The (m, n) view of a parameter of global ``shape``, or None if it has no matrix view (rank below 2, or empty).

    Dimensions of size 1 are dropped and the rest is flattened to (first, product of the others).

    >>> matrix_shape((64, 3, 7, 7)), matrix_shape((1, 197, 768)), matrix_shape((1, 768))
    ((64, 147), (197, 768), None)
    """
    dims = [int(size) for size in shape if size != 1]
    if len(dims) < 2 or 0 in dims:
        return None
    return dims[0], math.prod(dims[1:])


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a parameter of this ``shape`` looks like a stack of matrices, such as the experts of a layer.

    It has three dimensions longer than 1, and the last is not the kernel of a convolution: short, and the smallest.

    >>> is_stack((8, 2048, 1024)), is_stack((512, 256, 3)), is_stack((1, 197, 768)), is_stack((64, 3, 7, 7))
    (True, False, False, False)
    """
    if len(shape) != 3 or min(shape) <= 1:
        return False
    return shape[2] > _LONGEST_KERNEL or shape[2] >= min(shape[:2])


def split_dimension(size: int, limit: int, split: str) -> list[int]:
    """Cut ``size`` into parts of at most ``limit``.

    ``"aligned"``: as few parts as possible. All but the last are multiples of 64; of 32, 16 or 8, if the last part
    would else be shorter than three quarters of the first. ``"even"``: as few parts, whose sizes differ by at most 1.
    ``"remainder"``: parts of ``limit`` and what remains, as in the paper. The largest parts come first.

    >>> split_dimension(1600, 1024, "aligned"), split_dimension(1600, 1024, "even")
    ([832, 768], [800, 800])
    >>> split_dimension(1536, 1200, "even"), split_dimension(1536, 1200, "remainder")
    ([768, 768], [1200, 336])
    """
    return [part for part, count in count_parts(size, limit, split) for _ in range(count)]


def count_parts(size: int, limit: int, split: str) -> list[tuple[int, int]]:
    """The sizes of the parts of :func:`split_dimension`, and how many parts there are of each.

    >>> count_parts(2500, 1024, "aligned"), count_parts(2500, 1024, "even"), count_parts(2500, 1024, "remainder")
    ([(896, 1), (832, 1), (772, 1)], [(834, 1), (833, 2)], [(1024, 2), (452, 1)])
    """
    parts = -(-size // limit)
    if split == "remainder":
        counts = [(limit, size // limit), (size % limit, 1)]
    elif split == "even" or parts == 1:
        counts = _in_units(size, parts, 1)
    else:
        found = (_in_units(size, parts, unit) for unit in _ALIGNED)
        even = _in_units(size, parts, 1)
        counts = next((c for c in found if c[0][0] <= limit and 4 * c[-1][0] >= 3 * c[0][0]), even)
    return [(part, count) for part, count in counts if part and count]


def _in_units(size: int, parts: int, unit: int) -> list[tuple[int, int]]:
    """About equal parts of whole units. The last unit may be cut short, and the last part with it."""
    units = -(-size // unit)
    lacking = units * unit - size
    small, larger = divmod(units, parts)
    counts = [((small + 1) * unit, larger), (small * unit, parts - larger - 1), (small * unit - lacking, 1)]
    counts = [(part, count) for part, count in counts if count]
    if len(counts) > 1 and counts[-1][0] == counts[-2][0]:
        counts[-2:] = [(counts[-1][0], counts[-2][1] + 1)]
    return counts


def cut_blocks(matrix: tuple[int, int], limit: int, split: str) -> list[Block]:
    """The blocks of a parameter matrix, row by row."""
    row_sizes, column_sizes = (split_dimension(size, limit, split) for size in matrix)
    blocks = []
    row = 0
    for rows in row_sizes:
        column = 0
        for columns in column_sizes:
            blocks.append(Block(row, column, rows, columns))
            column += columns
        row += rows
    return blocks


def interval_pieces(block: Block, width: int, start: int, stop: int) -> list[Block]:
    """The part of ``block`` that lies in the elements ``start`` to ``stop`` of its matrix, flattened row by row.

    ``width`` is the number of columns of the matrix. Returns at most three rectangles, in the order of their elements:
    a part of a first row, whole rows of the block, a part of a last row.

    >>> interval_pieces(Block(0, 0, 3, 4), width=6, start=2, stop=14)
    [Block(row=0, column=2, rows=1, columns=2), Block(row=1, column=0, rows=1, columns=4), \
Block(row=2, column=0, rows=1, columns=2)]
    """
    left, right = block.column, block.column + block.columns
    first_whole = max(block.row, -((left - start) // width))
    end_whole = min(block.row + block.rows, (stop - right) // width + 1)
    if start >= stop:
        return []

    def part(row: int) -> list[Block]:
        begin, end = max(left, start - row * width), min(right, stop - row * width)
        inside = block.row <= row < block.row + block.rows and begin < end
        return [Block(row, begin, 1, end - begin)] if inside else []

    if first_whole < end_whole:
        whole = Block(first_whole, left, end_whole - first_whole, block.columns)
        return [*part(first_whole - 1), whole, *part(end_whole)]
    return [piece for row in sorted({first_whole - 1, end_whole}) for piece in part(row)]
