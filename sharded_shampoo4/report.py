"""Words for users: tables, bytes, lists of names, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .layout import is_stack, matrix_shape
from .options import PreconditionerOptions
from .preconditioner import Matrix

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NOT_THE_USERS = ("sharded_shampoo4", "torch", "contextlib")


def warn(message: str) -> None:
    """Warn at the user's line: the innermost one that is not of this package, torch or contextlib."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def shorten(names: Iterable[Any], shown: int = 3) -> str:
    """List the first of some names.

    >>> shorten("abcd")
    'a, b, c, ...'
    """
    words = list(map(str, names))
    return ", ".join(words[:shown]) + (", ..." if len(words) > shown else "")


def format_bytes(count: float) -> str:
    """Write a count of bytes in words.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Write rows of text, the first a header, in aligned columns."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe_parameter(
    name: str, whole: torch.Size, trained: bool, options: PreconditionerOptions, owners: str
) -> tuple[tuple[str, ...], int]:
    """A row of :meth:`Shampoo4.describe`'s table, and the bytes of the parameter's preconditioner."""
    shape = matrix_shape(whole)
    if not options.precondition:
        reason = "no: precondition=False"
    elif not trained:
        reason = "no: frozen"
    elif shape is None:
        reason = "no: empty" if whole.numel() == 0 else "no: not a matrix"
    else:
        matrix = Matrix(name, shape, options, torch.device("meta"))
        sizes = dict.fromkeys(f"{block.rows} x {block.columns}" for block in matrix.blocks)
        blocks = f"{len(matrix.blocks)} of {', '.join(sizes)}"
        orders = {order for block in matrix.blocks for order in (block.rows, block.columns)}
        bits = sorted({options.bits if options.is_quantized(order) else 32 for order in orders})
        kept = f"yes: {' and '.join(map(str, bits))} bits" + (
            f", as {shape[0]} x {shape[1]}" if is_stack(whole) else ""
        )
        size = format_bytes(matrix.nbytes)
        if matrix.is_costly:
            size += f", {matrix.bytes_per_element:.0f} per element"
        return (name, str(tuple(whole)), kept, blocks, owners, size), matrix.nbytes
    return (name, str(tuple(whole)), reason, "", "", ""), 0
