"""The elements of a parameter, and of a block, that a rank holds: integers only, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .blocks import Block


class Rectangle(NamedTuple):
    """A part of a matrix: ``matrix[row : row + rows, column : column + columns]``."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """What to index the matrix with."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)


class Shard(NamedTuple):
    """The elements of a flattened (row-major) parameter that a rank holds.

    They are ``repeats`` intervals of equal length. The first is from ``start`` to ``stop``, and each next one lies
    ``stride`` elements further on. The rank's local tensor holds them one after another.

    A ``stride`` of 0 is that of a plain interval, with a ``repeats`` of 1. Otherwise the parameter is a table with rows
    of ``stride`` elements, and the shard is the rectangle of ``repeats`` of these rows that has ``stop - start`` of the
    columns. All shards of a parameter have the same stride, except those without elements.

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

    def before(self, index: int) -> int:
        """How many of its elements stand before an element of the flattened parameter."""
        width, offset = self.stop - self.start, max(index - self.start, 0)
        number, rest = divmod(offset, self.stride) if self.stride else (0, offset)
        return width * number + min(rest, width) if number < self.repeats else self.length


def make_shard(start: int, stop: int, replica: int = 0, repeats: int = 1, stride: int = 0) -> Shard:
    """Return a shard from ``start`` to ``stop``, ``repeats`` times; from 0 to 0 if it has no elements."""
    return Shard(start, stop, replica, repeats, stride) if stop > start and repeats else Shard(0, 0, replica)


def interval_pieces(block: Block, width: int, start: int, stop: int) -> list[Rectangle]:
    """The part of ``block`` that lies in the elements ``start`` to ``stop`` of its matrix, flattened row by row.

    ``width`` is the number of columns of the matrix. Returns at most three rectangles, in the order of their elements:
    a part of a first row, whole rows of the block, a part of a last row.

    >>> interval_pieces(Block(0, 0, 3, 4), width=6, start=2, stop=14)
    [Rectangle(row=0, column=2, rows=1, columns=2), Rectangle(row=1, column=0, rows=1, columns=4), \
Rectangle(row=2, column=0, rows=1, columns=2)]
    """
    left, right = block.column, block.column + block.columns
    first_whole = max(block.row, -((left - start) // width))
    end_whole = min(block.row + block.rows, (stop - right) // width + 1)
    if start >= stop:
        return []

    def part(row: int) -> list[Rectangle]:
        begin, end = max(left, start - row * width), min(right, stop - row * width)
        inside = block.row <= row < block.row + block.rows and begin < end
        return [Rectangle(row, begin, 1, end - begin)] if inside else []

    if first_whole < end_whole:
        whole = Rectangle(first_whole, left, end_whole - first_whole, block.columns)
        return [*part(first_whole - 1), whole, *part(end_whole)]
    return [piece for row in sorted({first_whole - 1, end_whole}) for piece in part(row)]


def shard_pieces(block: Block, width: int, shard: Shard) -> list[Rectangle]:
    """The parts of ``block`` that ``shard`` has, as rectangles of the matrix, always in the same order.

    ``width`` is the number of columns of the matrix. Where the rows of the matrix are whole rows of the shard's table,
    as those of a weight that tensor parallelism cuts by columns, there is one rectangle for each row of the table that
    the columns of the block touch. Otherwise there are at most three for each interval.

    >>> shard_pieces(Block(0, 0, 3, 4), width=6, shard=Shard(8, 10, repeats=2, stride=6))
    [Rectangle(row=1, column=2, rows=2, columns=2)]
    """
    if not shard.stride:
        return interval_pieces(block, width, shard.start, shard.stop)
    if width % shard.stride == 0:
        return _band_pieces(block, width, shard)
    first = block.row * width + block.column
    end = (block.row + block.rows - 1) * width + block.column + block.columns
    intervals = shard.intervals(first, end)
    return [piece for start, stop in intervals for piece in interval_pieces(block, width, start, stop)]


def _band_pieces(block: Block, width: int, shard: Shard) -> list[Rectangle]:
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
            pieces.append(Rectangle(top, left, bottom - top, right - left))
    return pieces
