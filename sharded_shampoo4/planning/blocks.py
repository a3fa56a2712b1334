"""Which parameters are matrices and how they are cut into blocks: integers only, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ALIGNED = (64, 32, 16, 8)  # elements: tiles of matrix products, on GPUs and in the caches of CPUs
_LONGEST_KERNEL = 11  # of convolutions in one dimension, as far as they are usual


class Shard(NamedTuple):
    """The elements of a flattened (row-major) parameter that a rank holds.

    They are ``repeats`` intervals of equal length. The first is from ``start`` to ``stop``, and each next one lies
    ``stride`` elements further on. The rank's local tensor holds them one after another.

    A ``stride`` of 0 is that of a plain interval, with a ``repeats`` of 1. Otherwise the parameter is a table with rows
    of ``stride`` elements, and the shard is the rectangle of ``repeats`` of these rows that has ``stop - start`` of the
    columns. All shards of a parameter have the same stride, but for those without elements.

    ``replica`` tells the complete copies of the parameter apart: all shards of one replica together tile it. It is the
    rank where every rank holds everything, and the first rank of a copy that is a DTensor. An empty shard is from 0 to
    0.
    """

    start: int
    stop: int
    replica: int = 0
    repeats: int = 1
    stride: int = 0

    @property
    def length(self) -> int:
        """How many elements it has."""
        return self.repeats * (self.stop - self.start)

    @property
    def elements(self) -> tuple[int, int, int, int]:
        """What is equal for shards of the same elements, in whatever replica."""
        return self.start, self.stop, self.repeats, self.stride

    def describe(self) -> str:
        """Return its intervals in words."""
        return f"[{self.start}, {self.stop})" + (f" {self.repeats} times, each {self.stride} on" if self.stride else "")

    def intervals(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the starts and stops of the intervals that have any of the elements ``first`` to ``end``."""
        if not self.stride:
            if self.start < end and self.stop > first:
                yield self.start, self.stop
            return
        begin = max(0, (first - self.stop) // self.stride + 1)
        for number in range(begin, min(self.repeats, -((self.start - end) // self.stride))):
            yield self.start + number * self.stride, self.stop + number * self.stride

    def place(self, element: int) -> int:
        """Return where an ``element`` of the parameter that it has stands in the local tensor."""
        number = (element - self.start) // self.stride if self.stride else 0
        return element - self.start - number * (self.stride - (self.stop - self.start))

    def row_width(self, width: int) -> int:
        """Return how far apart in the local tensor are rows that are ``width`` elements apart in the parameter.

        These are rows of one of its :func:`shard_pieces`.
        """
        whole = self.stride and width % self.stride == 0
        return width // self.stride * (self.stop - self.start) if whole else width


def make_shard(start: int, stop: int, replica: int = 0, repeats: int = 1, stride: int = 0) -> Shard:
    """Return a shard from ``start`` to ``stop``, ``repeats`` times; from 0 to 0 if it has no elements."""
    return Shard(start, stop, replica, repeats, stride) if stop > start and repeats else Shard(0, 0, replica)


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


def shard_pieces(block: Block, width: int, shard: Shard) -> list[Block]:
    """The parts of ``block`` that ``shard`` has, as rectangles of the matrix, always in the same order.

    ``width`` is the number of columns of the matrix. Where the rows of the matrix are whole rows of the shard's table,
    as those of a weight that tensor parallelism cuts by columns, there is one rectangle for each row of the table that
    the columns of the block touch. Otherwise there are at most three for each interval.

    >>> shard_pieces(Block(0, 0, 3, 4), width=6, shard=Shard(8, 10, repeats=2, stride=6))
    [Block(row=1, column=2, rows=2, columns=2)]
    """
    if not shard.stride:
        return interval_pieces(block, width, shard.start, shard.stop)
    if width % shard.stride == 0:
        return _band_pieces(block, width, shard)
    first = block.row * width + block.column
    end = (block.row + block.rows - 1) * width + block.column + block.columns
    intervals = shard.intervals(first, end)
    return [piece for start, stop in intervals for piece in interval_pieces(block, width, start, stop)]


def _band_pieces(block: Block, width: int, shard: Shard) -> list[Block]:
    """The parts of ``block`` in a shard whose stride divides ``width``: for each band of columns, some whole rows."""
    bands = width // shard.stride  # that the matrix has beside each other
    number, inside = divmod(shard.start, shard.stride)  # of the shard's first interval, and where it is in its band
    pieces = []
    for band in range(block.column // shard.stride, -(-(block.column + block.columns) // shard.stride)):
        begin = band * shard.stride + inside
        left, right = max(block.column, begin), min(block.column + block.columns, begin + shard.stop - shard.start)
        top = max(block.row, -((band - number) // bands))
        bottom = min(block.row + block.rows, (number + shard.repeats - 1 - band) // bands + 1)
        if left < right and top < bottom:
            pieces.append(Block(top, left, bottom - top, right - left))
    return pieces
