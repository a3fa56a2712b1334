"""Exact bytes of the optimizer's states: measured from tensors, or from shapes before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .integrations.fsdp import local_tensor
from .layout import matrix_shape
from .options import OPTION_NAMES, PreconditionerOptions, base_arguments, base_class
from .preconditioner import Matrix

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank: what :meth:`Shampoo4.state_bytes` will measure once every parameter has had a gradient."""

    preconditioner: list[int]
    base: list[int]
    traffic: list[int]  # sent per step, by the optimizer

    @property
    def total(self) -> list[int]:
        return [preconditioner + base for preconditioner, base in zip(self.preconditioner, self.base, strict=True)]

    def __str__(self) -> str:
        header = ("rank", "preconditioner", "base", "total", "sent per step")
        columns = zip(self.preconditioner, self.base, self.total, self.traffic, strict=True)
        return table([header, *((str(rank), *map(format_bytes, row)) for rank, row in enumerate(columns))])


def estimate_memory(
    named_shapes: Mapping[str, Any] | Iterable[tuple[str, Any]],
    world_size: int = 1,
    *,
    host: str = "fsdp2",
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-3,
    base: str | type[torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    **shampoo4_options: Any,
) -> MemoryEstimate:
    """Bytes of the optimizer's states on every rank, from shapes only.

    Args:
        named_shapes: names and shapes (or tensors, whose shapes are taken) of the parameters that are trained, such as
            ``model.named_parameters()``.
        world_size: number of ranks; 1 is what this version can tell.
        host: what shards the parameters.
        dtype: type of the parameters, which is that of most base optimizers' states.
        lr, base, weight_decay, **shampoo4_options: as :class:`Shampoo4` takes them.

    Raises:
        TypeError, ValueError: as :class:`Shampoo4` does.
    """
    if world_size != 1:
        raise ValueError(f"world_size must be 1: states are not sharded by this version, got {world_size!r}")
    own = {name: shampoo4_options.pop(name) for name in OPTION_NAMES if name in shampoo4_options}
    options = PreconditionerOptions(**own)
    rule = base_class(base)
    per_element, per_tensor = _base_costs(rule, base_arguments(rule, lr, weight_decay, shampoo4_options), dtype)

    preconditioner = base_bytes = 0
    items = named_shapes.items() if isinstance(named_shapes, Mapping) else named_shapes
    for name, shape_or_tensor in items:
        shape = shape_or_tensor.shape if isinstance(shape_or_tensor, Tensor) else torch.Size(shape_or_tensor)
        base_bytes += per_element * shape.numel() + per_tensor
        matrix = matrix_shape(shape) if options.precondition else None
        if matrix:
            preconditioner += Matrix(name, matrix, options, torch.device("meta")).nbytes
    return MemoryEstimate([preconditioner], [base_bytes], [0])


def _base_costs(rule: type[torch.optim.Optimizer], arguments: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes per element and per parameter of the base optimizer's states, read off one step on a tiny parameter."""
    probe = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    optimizer = rule([probe], **arguments)
    optimizer.step()
    tensors = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    elementwise = [tensor for tensor in tensors if tensor.shape == probe.shape]
    per_element = sum(tensor.element_size() for tensor in elementwise)
    return per_element, tensor_bytes([tensors]) - per_element * probe.numel()


def tensor_bytes(states: Iterable[Any]) -> int:
    """Bytes of all tensors in (nested) containers, those of this rank where they are sharded."""
    total = 0
    for value in states:
        if isinstance(value, Tensor):
            total += local_tensor(value).numel() * value.element_size()
        elif isinstance(value, Mapping):
            total += tensor_bytes(value.values())
        elif isinstance(value, (list, tuple)):
            total += tensor_bytes(value)
    return total


def format_bytes(count: float) -> str:
    """A count of bytes in words.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def describe_parameter(name: str, parameter: Tensor, options: PreconditionerOptions) -> tuple[tuple[str, ...], int]:
    """A row of :meth:`Shampoo4.describe`'s table, and the bytes of the parameter's preconditioner."""
    shape = matrix_shape(parameter.shape)
    if not options.precondition:
        reason = "no: precondition=False"
    elif not parameter.requires_grad and parameter.grad is None:
        reason = "no: frozen"
    elif shape is None:
        reason = "no: empty" if parameter.numel() == 0 else "no: not a matrix"
    else:
        matrix = Matrix(name, shape, options, parameter.device)
        sizes = dict.fromkeys(f"{block.rows} x {block.columns}" for block in matrix.blocks)
        blocks = f"{len(matrix.blocks)} of {', '.join(sizes)}"
        orders = {order for block in matrix.blocks for order in (block.rows, block.columns)}
        bits = sorted({options.bits if options.is_quantized(order) else 32 for order in orders})
        kept = f"yes: {' and '.join(map(str, bits))} bits"
        return (name, str(tuple(parameter.shape)), kept, blocks, "0", format_bytes(matrix.nbytes)), matrix.nbytes
    return (name, str(tuple(parameter.shape)), reason, "", "", ""), 0


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of text, the first a header, in aligned columns."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
