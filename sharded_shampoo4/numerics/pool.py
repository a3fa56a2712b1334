"""Pools: equal things, such as factors of one order, packed in a few tensors whose first dimension counts them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import PreconditionerOptions
from . import quantization

Index = slice | Tensor  # which members of a pool: a run of neighbors (a view, no copy) or their positions
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name, shape and type of every tensor of one member


class Coding(NamedTuple):
    """How rows are kept in low precision: see :func:`.quantization.quantize`."""

    codebook: str
    bits: int
    block: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, options: PreconditionerOptions) -> Coding:
        """Return how ``options`` have factors stored."""
        scale_dtype: torch.dtype = getattr(torch, options.scale_dtype)
        return cls(options.codebook, options.bits, options.quant_block_size, scale_dtype)

    def in_8_bits(self) -> Coding:
        """Return the coding of what must be more precise: 8 bits, linear squares."""
        return self._replace(codebook="linear2", bits=8)

    def layout(self, name: str, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the tensors that a (rows, columns) matrix is kept in."""
        return {
            f"{name}.codes": ((rows, quantization.packed_width(columns, self.bits)), torch.uint8),
            f"{name}.scales": ((rows, quantization.block_count(columns, self.block)), self.scale_dtype),
        }


def layout_bytes(layout: Layout) -> int:
    """Bytes of one member."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


class Pool:
    """``count`` members, each of which keeps the tensors of ``layout``.

    A matrix is kept under its name, or as ``.codes`` and ``.scales`` of its rows, of which a ``.diagonal`` may be kept
    apart.
    """

    def __init__(self, layout: Layout, count: int, coding: Coding, device: torch.device) -> None:
        self.count = count
        self.device = device
        self.coding = coding
        self.tensors = {
            name: torch.zeros((count, *shape), dtype=dtype, device=device) for name, (shape, dtype) in layout.items()
        }
        self._views: dict[tuple[str, int, int], Tensor] = {}  # of those tensors, which stay where they are

    def encode(self, name: str, matrices: Tensor, coding: Coding | None = None) -> dict[str, Tensor]:
        """Return the stored form of ``matrices`` (k, rows, columns), by the names of the tensors.

        ``coding`` is that of the pool, unless it is given.
        """
        if name in self.tensors:
            return {name: matrices.to(self.tensors[name].dtype)}
        encoded = {}
        if f"{name}.diagonal" in self.tensors:
            matrices = matrices.to(torch.float32, copy=True)
            diagonal = matrices.diagonal(dim1=-2, dim2=-1)
            encoded[f"{name}.diagonal"] = diagonal.clone()
            diagonal.zero_()
        codebook, bits, block, scale_dtype = coding or self.coding
        encoded[f"{name}.codes"], encoded[f"{name}.scales"] = quantization.quantize(
            matrices, codebook=codebook, bits=bits, block=block, scale_dtype=scale_dtype
        )
        return encoded

    def decode(
        self,
        name: str,
        where: Index,
        columns: int,
        coding: Coding | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the matrices (k, rows, columns) that are stored under ``name``: codes as numbers of ``dtype``.

        Those stored as they are have their own type, and may be views of what is stored.
        """
        if name in self.tensors:
            return self.stored(name, where)
        codes, scales = self.stored(f"{name}.codes", where), self.stored(f"{name}.scales", where)
        codebook, bits, block, _ = coding or self.coding
        matrices = quantization.dequantize(
            codes, scales, columns, codebook=codebook, bits=bits, block=block, dtype=dtype
        )
        if f"{name}.diagonal" in self.tensors:
            matrices.diagonal(dim1=-2, dim2=-1).copy_(self.stored(f"{name}.diagonal", where))
        return matrices

    def stored(self, key: str, where: Index) -> Tensor:
        """Return what is stored of some members; views of neighbors are made once."""
        if not isinstance(where, slice):
            return self.tensors[key][where]
        place = key, where.start, where.stop
        if place not in self._views:
            self._views[place] = self.tensors[key][where]
        return self._views[place]

    def to_bytes(self, index: int) -> Tensor:
        """Return one member's tensors, one after the other, as uint8."""
        return torch.cat([tensor[index].flatten().view(torch.uint8) for tensor in self.tensors.values()])

    def from_bytes(self, index: int, data: Tensor) -> None:
        """Restore what :meth:`to_bytes` gave."""
        start = 0
        for tensor in self.tensors.values():
            size = tensor[index].numel() * tensor.element_size()
            # Cloned: a float32 view needs an aligned start.
            tensor[index] = data[start : start + size].clone().view(tensor.dtype).view_as(tensor[index])
            start += size

    @property
    def member_bytes(self) -> int:
        """Bytes of one member."""
        return self.nbytes // self.count

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
