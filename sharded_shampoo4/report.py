"""Words for users: what an optimizer says of itself, tables, bytes, lists of names, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .numerics.factors import HEALTH
from .numerics.matrix import Matrix
from .options import PreconditionerOptions
from .planning.schedule import first_root
from .planning.views import look

if TYPE_CHECKING:
    from .members import Members
    from .session import Session

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


# -- of an optimizer ---------------------------------------------------------------------------------------------------


def health(session: Session) -> dict[str, dict[str, float]]:
    """Measure :meth:`Shampoo4.health`; collective."""
    worst = session.health()
    return {
        matrix.name: {
            **dict(zip(HEALTH, worst[matrix.name], strict=True)),
            "bytes": matrix.nbytes,
            "steps": matrix.step,
            "roots": matrix.roots,
        }
        for distributor in session.all()
        for matrix in distributor.matrices
    }


def describe(session: Session, groups: Sequence[dict[str, Any]]) -> str:
    """Write the table of :meth:`Shampoo4.describe`."""
    owners = session.owners()
    alone = session.ranks is None or session.ranks.size == 1
    parameters = _parameters(session.members, groups)
    described = [_describe_parameter(p, "0" if alone else owners.get(p.parameter, "?")) for p in parameters]
    header = ("parameter", "shape", "preconditioned", "blocks", "owner", "bytes")
    total = ("all", "", "", "", "", format_bytes(sum(size for _, size in described)))
    return f"{table([header, *(row for row, _ in described), total])}\n{_progress(session, parameters)}".rstrip()


class _Parameter(NamedTuple):
    name: str
    parameter: Tensor
    shape: torch.Size  # of the whole
    trained: bool
    options: PreconditionerOptions


def _parameters(members: Members, groups: Sequence[dict[str, Any]]) -> list[_Parameter]:
    if not members.partitioned:
        return [_Parameter(e.name, e.parameter, e.shape, e.trained, e.options) for e in members.entries(groups)]
    given = [(name, p, options) for name, p, options in members.given() if p is not None]
    return [_Parameter(name, p, members.host.shape(p), p.requires_grad, options) for name, p, options in given]


def _progress(session: Session, parameters: Sequence[_Parameter]) -> str:
    """How far preconditioning has come, in a sentence; empty where nothing is preconditioned."""
    matrices = [matrix for distributor in session.all() for matrix in distributor.matrices]
    steps = max((matrix.step for matrix in matrices), default=0)
    computed = []
    for what, is_soap in (("eigenbases", True), ("inverse roots", False)):
        times = max((matrix.roots for matrix in matrices if matrix.is_soap == is_soap), default=0)
        if times:
            computed.append(f"{what} were computed {times} times")
    if computed:
        return f"Preconditioned: {' and '.join(computed)} in {steps} steps."
    begins = [first_root(p.options) for p in parameters if p.trained and p.options.precondition]
    if not begins:
        return ""
    if session.loaded and not matrices:
        return "Preconditioning goes on where the states that were loaded left off."
    if min(begins) == 1:
        return "Preconditioning begins with the first step."
    return f"Preconditioning begins with step {min(begins)}, after {steps} so far: until then the base works alone."


def _describe_parameter(parameter: _Parameter, owners: str) -> tuple[tuple[str, ...], int]:
    """A row of the table, and the bytes of the parameter's preconditioner."""
    name, _, whole, trained, options = parameter
    seen = look(name, tuple(whole), options)
    if seen.view is None or not trained:
        reason = seen.reason if seen.view is None else "frozen"
        return (name, str(tuple(whole)), f"no: {reason}", "", "", ""), 0
    matrix = Matrix.of(name, whole, options, torch.device("meta"))
    assert matrix is not None
    orders = {order for block in matrix.blocks for order in block.orders if order}
    bits = sorted({options.bits if options.is_quantized(order) else 32 for order in orders})
    method = "" if options.method == "shampoo" else f"{options.method}, "
    kept = [f"yes: {method}{' and '.join(map(str, bits))} bits"]
    if seen.view.shape != tuple(whole) or seen.view.parts:
        kept.append(f"as {seen.view}{f' ({seen.reason})' if seen.reason else ''}")
    if sides := _missing_sides(matrix):
        kept.append(sides)
    sizes = dict.fromkeys(f"{block.rows} x {block.columns}" for block in matrix.blocks)
    blocks = f"{len(matrix.blocks)} of {', '.join(sizes)}"
    size = format_bytes(matrix.nbytes)
    if matrix.is_costly:
        size += f", {matrix.bytes_per_element:.0f} per element"
    return (name, str(tuple(whole)), ", ".join(kept), blocks, owners, size), matrix.nbytes


def _missing_sides(matrix: Matrix) -> str:
    """Which sides have no factors, in words; empty if all have."""
    found = {(block.left, block.right) for block in matrix.blocks}
    if found == {(True, True)}:
        return ""
    if len(found) > 1:
        return "some matrices on one side only"
    ((left, _),) = found
    exponent = "" if matrix.is_soap else ", exponent -1/2"
    return f"{'rows' if left else 'columns'} only, max_aspect={matrix.options.max_aspect}{exponent}"
