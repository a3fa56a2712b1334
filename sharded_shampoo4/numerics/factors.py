"""Pools of equal-order factors, kept packed: absorb statistics, recompute inverse roots, give inverse roots.

A factor is one side's preconditioner of a block. A pool keeps many of them in tensors whose first dimension counts
factors, and computes them in batches; it knows neither parameters nor ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import PreconditionerOptions
from . import eigenbasis, linalg, quantization

Index = slice | Tensor  # which factors of a pool: a run of neighbors (a view, no copy) or their positions

# Elements of the (factors, n, n) matrices that one statistics or root step has in hand, for each MiB of scratch memory:
# some fourteen times over, in float64.
REFRESH_ELEMENTS_PER_MIB = 2**13

# What FactorPool.health tells of a factor: the distance of its basis from an orthogonal one, ||V^T V - I||_F / sqrt(n),
# as it is stored and after the rectification before a root; its eigenvalues' range; the most failures in a row.
HEALTH = ("orthogonality_error", "rectified_error", "smallest_eigenvalue", "largest_eigenvalue", "failures")

_STATISTICS, _ROOT = 0, 1  # the two counts of failures in a row


def factor_layout(order: int, options: PreconditionerOptions) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and type of every tensor that one factor keeps: the one place that decides what is stored.

    ``eigenvalues`` and ``basis`` (rows are eigenvectors), or the matrix itself, as ``statistics`` in float32 or as a
    float32 diagonal and low-precision off-diagonal; the same for the inverse ``root``, unless roots are implicit;
    ``failures`` counts statistics and root steps that failed in a row.
    """

    def packed(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        scales = (order, quantization.block_count(order, options.quant_block_size))
        return {
            f"{name}.codes": ((order, quantization.packed_width(order, options.bits)), torch.uint8),
            f"{name}.scales": (scales, getattr(torch, options.scale_dtype)),
        }

    vector = ((order,), torch.float32)
    matrix = ((order, order), torch.float32)
    failures = ((2,), torch.int32)
    if not options.is_quantized(order):
        return {"statistics": matrix, "root": matrix, "failures": failures}
    if options.quantize == "eigenbasis":
        layout = {"eigenvalues": vector, **packed("basis")}
    else:
        layout = {"statistics.diagonal": vector, **packed("statistics")}
    if options.root != "implicit":
        layout.update({"root.diagonal": vector, **packed("root")})
    return {**layout, "failures": failures}


def factor_bytes(order: int, options: PreconditionerOptions) -> int:
    """Bytes that one factor keeps."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in factor_layout(order, options).values())


class InverseRoot(NamedTuple):
    """Inverse roots (k, n, n): ``matrices`` themselves, or eigenvectors as columns and ``powers`` (k, n) of theirs."""

    matrices: Tensor
    powers: Tensor | None

    def left_of(self, blocks: Tensor) -> Tensor:
        """The roots times ``blocks`` (k, n, any)."""
        if self.powers is None:
            return linalg.matmul(self.matrices, blocks)
        seen = linalg.matmul(self.matrices.mT, blocks)
        return linalg.matmul(self.matrices, seen.mul_(self.powers.unsqueeze(-1)))

    def right_of(self, blocks: Tensor) -> Tensor:
        """``blocks`` (k, any, n) times the roots."""
        if self.powers is None:
            return linalg.matmul(blocks, self.matrices)
        seen = linalg.matmul(blocks, self.matrices)
        return linalg.matmul(seen.mul_(self.powers.unsqueeze(-2)), self.matrices.mT)


class FactorPool:
    """``count`` factors of one ``order``, with the same options, on one device.

    Fresh factors are those of the paper: statistics matrix_eps I, inverse root I.
    """

    def __init__(self, order: int, count: int, options: PreconditionerOptions, device: torch.device) -> None:
        self.order = order
        self.count = count
        self.options = options
        self.device = device
        self.refresh_dtype: torch.dtype = getattr(torch, options.refresh_dtype)
        self.tensors = {
            name: torch.zeros((count, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in factor_layout(order, options).items()
        }
        self._views: dict[tuple[str, int, int], Tensor] = {}  # of those tensors, which stay where they are
        self.dtype_of_scales: torch.dtype = getattr(torch, options.scale_dtype)
        self.implicit = "root" not in self.tensors and "root.diagonal" not in self.tensors
        identity = torch.eye(order, dtype=torch.float32, device=device).unsqueeze(0)
        if not self.implicit:
            self._initialize("root", identity)
        if "eigenvalues" in self.tensors:
            self.tensors["eigenvalues"].fill_(options.matrix_eps)
            self._initialize("basis", identity)
        else:
            self._initialize("statistics", options.matrix_eps * identity)

    def _initialize(self, name: str, matrix: Tensor) -> None:
        for key, value in self._encode(name, matrix).items():
            self.tensors[key].copy_(value.expand_as(self.tensors[key]))

    # -- what is stored ------------------------------------------------------------------------------------------------

    def _encode(self, name: str, matrices: Tensor) -> dict[str, Tensor]:
        """The stored form of ``matrices`` (k, n, n): rows as they are, or a diagonal and quantized rows, or rows."""
        if name in self.tensors:
            return {name: matrices.to(torch.float32)}
        encoded = {}
        if f"{name}.diagonal" in self.tensors:
            matrices = matrices.to(torch.float32, copy=True)
            diagonal = matrices.diagonal(dim1=-2, dim2=-1)
            encoded[f"{name}.diagonal"] = diagonal.clone()
            diagonal.zero_()
        encoded[f"{name}.codes"], encoded[f"{name}.scales"] = quantization.quantize(
            matrices,
            codebook=self.options.codebook,
            bits=self.options.bits,
            block=self.options.quant_block_size,
            scale_dtype=self.dtype_of_scales,
        )
        return encoded

    def _decode(self, name: str, where: Index) -> Tensor:
        """The matrices (k, n, n), float32, that were encoded under ``name``."""
        if name in self.tensors:
            return self._stored(name, where)
        dequantize = quantization.dequantize_compiled if self.options.compile else quantization.dequantize
        matrices = dequantize(
            self._stored(f"{name}.codes", where),
            self._stored(f"{name}.scales", where),
            self.order,
            codebook=self.options.codebook,
            bits=self.options.bits,
            block=self.options.quant_block_size,
        )
        if f"{name}.diagonal" in self.tensors:
            matrices.diagonal(dim1=-2, dim2=-1).copy_(self._stored(f"{name}.diagonal", where))
        return matrices

    def _stored(self, key: str, where: Index) -> Tensor:
        """What is stored of some factors; views of neighbors are made once."""
        if not isinstance(where, slice):
            return self.tensors[key][where]
        place = key, where.start, where.stop
        if place not in self._views:
            self._views[place] = self.tensors[key][where]
        return self._views[place]

    def _commit(self, where: Index, new: dict[str, Tensor], kind: int, wanted: Tensor | None = None) -> None:
        """Store ``new`` for the factors whose numbers are finite; the others keep what they had, and are counted.

        ``wanted`` (k,) tells which factors are to change at all; None means all of them.
        """
        finite = torch.stack([_finite(value) for value in new.values() if value.is_floating_point()]).all(0)
        changed = finite if wanted is None else finite & wanted
        for name, value in new.items():
            old = self.tensors[name]
            replaced = changed.view(-1, *[1] * (value.ndim - 1))
            old[where] = torch.where(replaced, value, old[where])
        failures = self.tensors["failures"][:, kind]
        failures[where] = torch.where(finite, 0, failures[where] + 1)

    # -- the algorithm -------------------------------------------------------------------------------------------------

    def absorb(self, where: Tensor, gradients: Tensor) -> None:
        """Statistics step: absorb G G^T of each of ``gradients`` (k, n, any) into the factors ``where``.

        A gradient of zeros leaves its factor as it is, as a gradient that is missing does. If the average decayed
        instead, the first gradient of a layer that wakes up would be scaled without bound.
        """
        beta = self.options.shampoo_beta
        for chunk, gradient in zip(self._chunks(where), gradients.split(self._chunk_size()), strict=True):
            gradient = gradient.to(self.refresh_dtype)
            statistic = linalg.matmul(gradient, gradient.mT)
            if "eigenvalues" in self.tensors:
                values, basis = self._eigenbasis(chunk, self.options.rectify_steps[0])
                values, basis = eigenbasis.refresh(values, basis, statistic, beta, self.options.refresh_iterations)
                new = {"eigenvalues": values.to(torch.float32), **self._encode("basis", basis.mT)}
            else:
                old = self._decode("statistics", chunk).to(self.refresh_dtype)
                new = self._encode("statistics", beta * old + (1 - beta) * statistic)
            self._commit(chunk, new, _STATISTICS, gradient.flatten(1).any(1))

    def invert(self, where: Tensor) -> None:
        """Root step: recompute the inverse fourth roots of the factors ``where``, if they are stored."""
        if self.implicit:
            return
        eps = self.options.matrix_eps
        for chunk in self._chunks(where):
            if "eigenvalues" in self.tensors:
                root = eigenbasis.inverse_root(*self._eigenbasis(chunk, self.options.rectify_steps[1]), eps)
            else:
                root = eigenbasis.inverse_root_of(self._decode("statistics", chunk).to(self.refresh_dtype), eps)
            self._commit(chunk, self._encode("root", root), _ROOT)

    def root(self, where: Index, dtype: torch.dtype) -> InverseRoot:
        """The inverse roots (k, n, n) of the factors ``where``, to multiply with blocks of ``dtype``."""
        if not self.implicit:
            return InverseRoot(self._decode("root", where).to(dtype), None)
        basis = eigenbasis.rectify(self._decode("basis", where).mT.contiguous(), self.options.rectify_steps[1])
        powers = eigenbasis.inverse_powers(self.tensors["eigenvalues"][where], self.options.matrix_eps)
        return InverseRoot(basis.to(dtype), powers.to(dtype))

    def health(self, where: Tensor) -> Tensor:
        """How the factors ``where`` are, float64 (k, 5): see HEALTH. NaN for the errors of factors without a basis."""
        rows = []
        for chunk in self._chunks(where):
            if "eigenvalues" in self.tensors:
                values, stored = self._eigenbasis(chunk, 0)
                errors = [_orthogonality_error(stored)]
                errors.append(_orthogonality_error(eigenbasis.rectify(stored, self.options.rectify_steps[1])))
            else:
                values, _ = linalg.eigh(self._decode("statistics", chunk).to(self.refresh_dtype))
                errors = [torch.full_like(values[:, 0], torch.nan)] * 2
            failures = self.tensors["failures"][chunk].amax(1)
            rows.append(torch.stack([*errors, values.amin(1), values.amax(1), failures.to(values.dtype)], dim=1))
        return torch.cat(rows).double()

    def _eigenbasis(self, where: Index, rectify_steps: int) -> tuple[Tensor, Tensor]:
        # Contiguous, or the layout of what is computed from it, and with it the rounding, would depend on the batch.
        basis = self._decode("basis", where).to(self.refresh_dtype).mT.contiguous()
        return self.tensors["eigenvalues"][where].to(self.refresh_dtype), eigenbasis.rectify(basis, rectify_steps)

    def _chunk_size(self) -> int:
        return max(1, REFRESH_ELEMENTS_PER_MIB * self.options.scratch_mib // self.order**2)

    def _chunks(self, where: Tensor) -> Iterator[Tensor]:
        return iter(where.split(self._chunk_size()))

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def to_bytes(self, index: int) -> Tensor:
        """One factor's tensors, one after the other, as uint8 (factor_bytes,)."""
        return torch.cat([tensor[index].flatten().view(torch.uint8) for tensor in self.tensors.values()])

    def from_bytes(self, index: int, data: Tensor) -> None:
        """Restore what :meth:`to_bytes` gave."""
        start = 0
        for tensor in self.tensors.values():
            size = tensor[index].numel() * tensor.element_size()
            # Cloned: a float32 view needs an aligned start.
            tensor[index] = data[start : start + size].clone().view(tensor.dtype).view_as(tensor[index])
            start += size

    def worst_failures(self) -> Tensor:
        """The most failures in a row of any factor: one number on the device."""
        return self.tensors["failures"].max()

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _orthogonality_error(basis: Tensor) -> Tensor:
    gram = linalg.matmul(basis.mT, basis)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    error: Tensor = torch.linalg.vector_norm(gram, dim=(1, 2)) / basis.shape[-1] ** 0.5
    return error


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)
