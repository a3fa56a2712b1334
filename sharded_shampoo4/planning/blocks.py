"""How matrices are cut into blocks: integers only, the same on every rank."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ALIGNED = (64, 32, 16, 8)  # elements: tiles of matrix products, on GPUs and in the caches of CPUs
_SMALL = 4096  # elements of a matrix
_LONG_BLOCKS = 8  # times as long as others may blocks be on a side without factors


class Block(NamedTuple):
    """A rectangle of a parameter matrix: ``matrix[row : row + rows, column : column + columns]``.

    ``left`` and ``right`` tell whether it has a left factor, of its rows, and a right one, of its columns.
    """

    row: int
    column: int
    rows: int
    columns: int
    left: bool = True
    right: bool = True

    @property
    def orders(self) -> tuple[int, int]:
        """The orders of its left and its right factor; 0 where it has none."""
        return self.rows * self.left, self.columns * self.right

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)


def count_parts(size: int, limit: int, split: str) -> list[tuple[int, int]]:
    """Cut ``size`` into parts of at most ``limit``: return their sizes, and how many parts there are of each.

    ``"aligned"``: as few parts as possible. All but the last are multiples of 64; of 32, 16 or 8, if the last part
    would else be shorter than three quarters of the first. ``"even"``: as few parts, whose sizes differ by at most 1.
    ``"remainder"``: parts of ``limit`` and what remains, as in the paper. The largest parts come first.

    >>> count_parts(1600, 1024, "aligned"), count_parts(1600, 1024, "even")
    ([(832, 1), (768, 1)], [(800, 2)])
    >>> count_parts(1536, 1200, "even"), count_parts(1536, 1200, "remainder")
    ([(768, 2)], [(1200, 1), (336, 1)])
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


class Cutting(NamedTuple):
    """How matrices are cut into blocks, and which of their sides have factors.

    Attributes:
        limit: most rows or columns of a block, on a side with factors.
        split: see :func:`count_parts`.
        max_aspect: a side more than this many times as long as the other has no factors, and longer blocks; 0: all
            sides have factors.
    """

    limit: int
    split: str
    max_aspect: int = 0

    def sides(self, rows: int, columns: int) -> tuple[bool, bool]:
        """Whether a matrix has left factors, and whether it has right ones.

        A small matrix may be four times as long: its factors cost little.

        >>> cutting = Cutting(256, "aligned", 7)
        >>> cutting.sides(16, 4096), cutting.sides(3072, 768), cutting.sides(10, 128)
        ((True, False), (True, True), (True, True))
        """
        if not self.max_aspect:
            return True, True
        aspect = self.max_aspect * (4 if rows * columns < _SMALL else 1)
        return rows <= aspect * columns, columns <= aspect * rows

    def lengths(self, rows: int, columns: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The sizes of the parts of a matrix's rows and of its columns, and how many parts there are of each."""
        sides = zip((rows, columns), self.sides(rows, columns), strict=True)
        by_rows, by_columns = (
            count_parts(size, self.limit if has_factor else _LONG_BLOCKS * self.limit, self.split)
            for size, has_factor in sides
        )
        return by_rows, by_columns


def cut_blocks(shape: tuple[int, int], cutting: Cutting, parts: Sequence[int] = ()) -> list[Block]:
    """The blocks of a parameter matrix, row by row; of each of its ``parts``, which are so many rows, by itself."""
    blocks: list[Block] = []
    start = 0
    for height in parts or (shape[0],):
        blocks += _cut_part(start, height, shape[1], cutting)
        start += height
    return blocks


def count_blocks(shape: tuple[int, int], cutting: Cutting, parts: Sequence[int] = ()) -> dict[Block, int]:
    """How many blocks there are of each size and with which factors; places are 0. Without cutting the matrix."""
    found: Counter[Block] = Counter()
    for height, matrices in Counter(parts or (shape[0],)).items():
        sides = cutting.sides(height, shape[1])
        by_rows, by_columns = cutting.lengths(height, shape[1])
        for (rows, m), (columns, n) in itertools.product(by_rows, by_columns):
            found[Block(0, 0, rows, columns, *sides)] += matrices * m * n
    return dict(found)


def _cut_part(start: int, height: int, width: int, cutting: Cutting) -> Iterator[Block]:
    sides = cutting.sides(height, width)
    row_sizes, column_sizes = (
        [size for size, count in counts for _ in range(count)] for counts in cutting.lengths(height, width)
    )
    row = start
    for rows in row_sizes:
        column = 0
        for columns in column_sizes:
            yield Block(row, column, rows, columns, *sides)
            column += columns
        row += rows
