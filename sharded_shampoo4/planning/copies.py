"""Copies of many rectangles between tensors, in as few operations as their places allow."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Many small copies go by an index of rows, which takes a few kernels. The length of a row divides all pieces. It is at
# least this many elements, since the index takes 8 bytes for each row.
SHORTEST_ROW = 64
# Few or large copies are made one by one, as views.
FEW_COPIES = 8
LARGE_COPY = 2**18  # elements


class Piece(NamedTuple):
    """A rectangle in one of several tensors, whose rows are ``width`` elements apart, the first at ``offset``."""

    tensor: int
    rows: int
    columns: int
    width: int
    offset: int


class _View(NamedTuple):
    """Where elements stand in one of several tensors: arguments of ``as_strided``, from the tensor's start on."""

    tensor: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Copies:
    """Copies of pieces from where they stand ``before`` to where they stand ``after``, of equal sizes in pairs.

    Pieces that follow one another alike on both sides, such as the blocks of a matrix, are copied as one view.
    """

    def __init__(self, before: Sequence[Piece], after: Sequence[Piece]) -> None:
        views = [(_view(a), _view(b)) for a, b in zip(before, after, strict=True)]
        for _ in range(2):  # the blocks of a row, then rows of blocks
            views = list(_merged(views))
        self._views = [_flattened(*pair) for pair in views]
        self._rows = self._by_rows(before, after)

    def _by_rows(self, before: Sequence[Piece], after: Sequence[Piece]) -> tuple[_Rows, _Rows] | None:
        elements = sum(math.prod(view.size) for view, _ in self._views)
        if len(self._views) <= FEW_COPIES or elements >= LARGE_COPY * len(self._views):
            return None
        length = math.gcd(*(number for piece in (*before, *after) for number in (piece.columns, *_starts(piece))))
        return (_Rows(before, length), _Rows(after, length)) if length >= SHORTEST_ROW else None

    def __bool__(self) -> bool:
        return bool(self._views)

    def __len__(self) -> int:
        """How many views there are on each side."""
        return len(self._views)

    def run(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy. All tensors are contiguous; types and devices may differ."""
        if self._rows is not None and _is_on_one_device(sources) and _is_on_one_device(targets):
            before, after = self._rows
            after.write(targets, before.read(sources))
        elif self._views:
            before_views, after_views = zip(*self._views, strict=True)
            torch._foreach_copy_(_as_strided(after_views, targets), _as_strided(before_views, sources))


# -- as views ----------------------------------------------------------------------------------------------------------


def _view(piece: Piece) -> _View:
    return _View(piece.tensor, (piece.rows, piece.columns), (piece.width, 1), piece.offset)


def _merged(pairs: Sequence[tuple[_View, _View]]) -> Iterator[tuple[_View, _View]]:
    """Join pairs of views that follow one another by equal steps on both sides, in a further dimension."""
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop < len(pairs) and all(_continues(pairs, side, start, stop) for side in (0, 1)):
            continue
        (one, other), (last, other_last), count = pairs[start], pairs[stop - 1], stop - start
        yield _repeated(one, last, count), _repeated(other, other_last, count)
        start = stop


def _repeated(first: _View, last: _View, count: int) -> _View:
    step = (last.offset - first.offset) // max(1, count - 1)
    return first._replace(size=(count, *first.size), stride=(step, *first.stride))


def _continues(pairs: Sequence[tuple[_View, _View]], side: int, start: int, index: int) -> bool:
    """Whether a view lies behind those from ``start`` on as they lie behind one another."""
    step = pairs[index][side].offset - pairs[index - 1][side].offset
    first, second = pairs[start][side], pairs[start + 1][side]
    return pairs[index][side][:3] == first[:3] and step > 0 and step == second.offset - first.offset


def _flattened(one: _View, other: _View) -> tuple[_View, _View]:
    """The same views with the fewest dimensions that both can have."""
    sizes: list[int] = []
    strides: list[tuple[int, int]] = []
    for size, *steps in zip(one.size, one.stride, other.stride, strict=True):
        pair = (steps[0], steps[1])
        if size == 1:
            continue
        if sizes and strides[-1] == (size * pair[0], size * pair[1]):
            sizes[-1] *= size
            strides[-1] = pair
        else:
            sizes.append(size)
            strides.append(pair)
    sizes, strides = sizes or [1], strides or [(1, 1)]
    first, second = zip(*strides, strict=True)
    return one._replace(size=tuple(sizes), stride=first), other._replace(size=tuple(sizes), stride=second)


def _as_strided(views: Sequence[_View], tensors: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for index, size, stride, offset in views:
        tensor = tensors[index]
        found.append(tensor.as_strided(size, stride, tensor.storage_offset() + offset))
    return found


def _is_on_one_device(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.device for tensor in tensors}) <= 1


# -- by rows -----------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The elements ``start`` to ``stop`` of one of several tensors."""

    tensor: int
    start: int
    stop: int


class _Rows:
    """Where pieces stand, as rows of ``length`` elements in the parts of tensors that hold any."""

    def __init__(self, pieces: Sequence[Piece], length: int) -> None:
        self._length = length
        self._parts = _covering(pieces)
        starts = [0, *itertools.accumulate((stop - start) // length for _, start, stop in self._parts)]  # their rows
        index = []
        for piece in pieces:
            number = bisect.bisect_right(self._parts, (piece.tensor, piece.offset, math.inf)) - 1
            first = starts[number] + (piece.offset - self._parts[number].start) // length
            across = _count(piece.columns // length)
            index.append((first + _count(piece.rows).unsqueeze(1) * (piece.width // length) + across).flatten())
        self._index = torch.cat(index)
        self._count = starts[-1]
        self._in_order = torch.equal(self._index, _count(self._count))
        self._on = cache(self._index.to)

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows (any, length), in the order of the pieces."""
        rows = _put_together(self._cut(tensors)).view(-1, self._length)
        return rows if self._in_order else rows.index_select(0, self._on(rows.device))

    def write(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        """Put the rows into their places."""
        parts = self._cut(tensors)
        if len(parts) == 1:
            self._arrange(rows.to(parts[0]), parts[0])
            return
        rows = rows.to(parts[0].device)
        if not self._in_order:
            whole = len(self._index) == self._count  # nothing stands between the pieces
            places = torch.empty_like(rows) if whole else _put_together(parts)
            dtype = torch.promote_types(rows.dtype, places.dtype)
            rows = self._arrange(rows.to(dtype), places.to(dtype))
        torch._foreach_copy_(parts, list(rows.flatten().split([stop - start for _, start, stop in self._parts])))

    def _arrange(self, rows: Tensor, places: Tensor) -> Tensor:
        """Put rows, in the order of the pieces, where they are to stand in a vector of all rows."""
        places = places.view(-1, self._length)
        return places.copy_(rows) if self._in_order else places.index_copy_(0, self._on(places.device), rows)

    def _cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for tensor, start, stop in self._parts:
            base = tensors[tensor]
            found.append(base.as_strided((stop - start,), (1,), base.storage_offset() + start))
        return found


def _put_together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _starts(piece: Piece) -> tuple[int, int]:
    """What the rows of a piece must begin with multiples of."""
    return piece.offset, piece.width if piece.rows > 1 else 0


def _covering(pieces: Sequence[Piece]) -> list[_Part]:
    """The parts of tensors that hold all pieces, each from the first element of a piece to the last of one.

    Of a single tensor it is one part, as nothing needs to be put together.
    """
    alone = len({piece.tensor for piece in pieces}) == 1
    found: list[_Part] = []
    for tensor, start, stop in sorted((piece.tensor, piece.offset, _stop(piece)) for piece in pieces):
        if found and found[-1].tensor == tensor and (start <= found[-1].stop or alone):
            found[-1] = found[-1]._replace(stop=max(found[-1].stop, stop))
        else:
            found.append(_Part(tensor, start, stop))
    return found


def _count(number: int) -> Tensor:
    return torch.arange(number, dtype=torch.int64, device="cpu")


def _stop(piece: Piece) -> int:
    return piece.offset + (piece.rows - 1) * piece.width + piece.columns
