"""How parameters are seen as matrices: from names, shapes and options alone, the same on every rank."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..options import PreconditionerOptions

_LONGEST_KERNEL = 31  # of convolutions in one dimension, as far as they are usual
_SINGLE_EXPERT = re.compile(r"(expert_?)?\d+")  # in a ModuleList, and in a ModuleDict as Switch Transformers name it


class View(NamedTuple):
    """A parameter, row by row, as matrices one above the other.

    Attributes:
        shape: rows and columns of all of them together.
        parts: rows of each matrix, if there are several; else empty.
    """

    shape: tuple[int, int]
    parts: tuple[int, ...] = ()

    def __str__(self) -> str:
        rows, columns = self.shape
        if not self.parts:
            return f"{rows} x {columns}"
        if len(set(self.parts)) == 1:
            return f"{len(self.parts)} of {self.parts[0]} x {columns}"
        few = self.parts if len(self.parts) <= 4 else (*self.parts[:3], "...")
        return f"{' + '.join(map(str, few))} rows x {columns}"


class Seen(NamedTuple):
    """The view of a parameter and the reason for it; or None, and the reason why it is not preconditioned."""

    view: View | None
    reason: str


@functools.lru_cache(maxsize=2**14)
def look(name: str, shape: tuple[int, ...], options: PreconditionerOptions) -> Seen:
    """Find the view of a parameter of global ``shape``.

    Dimensions of size 1 are dropped. What is left is flattened to (first, product of the others), with batch_dims=k
    after the first k dimensions, which count matrices. By default (batch_dims=-1) the shape and the name decide:

    - three dimensions are a stack of matrices, such as the experts of a layer, unless they look like a convolution's
      or the first is the longest, as in projections of shape (inputs, heads, size of a head). Parameters of modules
      that are called experts always are, but not those of one expert among them, as in ``experts.0.weight``;
    - stacked biases, whose names end with "bias", are left to the base optimizer.

    A depthwise convolution is a matrix with a row for each channel.

    ``split_rows`` cuts the rows of each matrix.

    >>> def view(*shape, **options):
    ...     return str(look("w", shape, PreconditionerOptions(**options)).view)
    >>> view(64, 3, 7, 7), view(1, 197, 768), view(1, 768), view(8, 2048, 1024), view(4096, 1, 4)
    ('64 x 147', '197 x 768', 'None', '8 of 2048 x 1024', '4096 x 4')
    >>> view(8, 2048, 1024, batch_dims=0), view(96, 64, split_rows=3), view(96, 64, split_rows=(64, 16, 16))
    ('8 x 2097152', '3 of 32 x 64', '64 + 16 + 16 rows x 64')

    Raises:
        ValueError: ``batch_dims`` or ``split_rows`` does not fit the shape.
    """
    if not options.precondition:
        return Seen(None, "precondition=False")
    if 0 in shape:
        return Seen(None, "empty")
    batch, reason = options.batch_dims, ""
    if batch < 0:
        batch = 1 if is_stack(shape, name) else 0
        reason = "a stack" if batch else ""
        if _is_bias(name) and len(shape) > 1:
            return Seen(None, "stacked biases")
    elif batch > len(shape):
        raise ValueError(f"batch_dims={batch} is more than {name} of shape {shape} has dimensions")
    count = math.prod(shape[:batch])
    dims = [size for size in shape[batch:] if size != 1]
    if len(dims) < 2:
        return Seen(None, "not a matrix")
    rows, columns = dims[0], math.prod(dims[1:])
    parts = _split(name, rows, options.split_rows) * count
    if options.split_rows:
        reason = f"split_rows={','.join(map(str, options.split_rows))}"
    return Seen(View((rows * count, columns), parts if len(parts) > 1 else ()), reason)


def matrix_view(name: str, shape: Sequence[int], options: PreconditionerOptions) -> View | None:
    """The view of a parameter; None if it is not preconditioned. See :func:`look`."""
    return look(name, tuple(shape), options).view


def is_stack(shape: Sequence[int], name: str = "") -> bool:
    """Whether a parameter of this ``shape`` and ``name`` looks like a stack of matrices, such as a layer's experts.

    It has three dimensions, and its name is that of experts. Or they are longer than 1, the first is not longer than
    both others, and the last is not the kernel of a convolution: short, and the smallest.

    >>> is_stack((8, 2048, 1024)), is_stack((512, 256, 3)), is_stack((1, 197, 768)), is_stack((64, 3, 7, 7))
    (True, False, False, False)
    >>> is_stack((4096, 32, 128)), is_stack((32, 128, 4096))  # from the inputs to heads, and from heads to the outputs
    (False, True)
    >>> is_stack((64, 32, 3), "moe.experts.w1"), is_stack((64, 32, 3), "moe.experts.0.weight")
    (True, False)
    """
    if len(shape) == 3 and _are_experts(name):
        return True
    if len(shape) != 3 or min(shape) <= 1 or shape[0] > max(shape[1:]):
        return False
    return shape[2] > _LONGEST_KERNEL or shape[2] >= min(shape[:2])


def _is_bias(name: str) -> bool:
    last = name.partition(" ")[0].rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _are_experts(name: str) -> bool:
    """Whether a parameter is that of a layer's experts, as transformers and torchtitan name it; not of a single one."""
    parts = name.partition(" ")[0].split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part.endswith("experts")]
    return bool(places) and not any(_SINGLE_EXPERT.fullmatch(part) for part in parts[places[-1] + 1 :])


def _split(name: str, rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The rows of each part: ``sizes``, or if that is one number, so many equal parts."""
    if not sizes:
        return (rows,)
    if len(sizes) == 1:
        if rows % sizes[0]:
            raise ValueError(f"split_rows={sizes[0]} does not divide the {rows} rows of {name}")
        return (rows // sizes[0],) * sizes[0]
    if sum(sizes) != rows:
        raise ValueError(f"split_rows={sizes} are {sum(sizes)} rows, and {name} has {rows}")
    return sizes
