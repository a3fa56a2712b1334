"""Pools of equal-order factors, kept packed: absorb statistics, recompute inverse roots, give inverse roots.

A factor is one side's preconditioner of a block. A pool keeps many of them in tensors whose first dimension counts
factors, and computes them in batches; it knows neither parameters nor ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import PreconditionerOptions
from . import eigenbasis, linalg
from .pool import Coding, Index, Pool, layout_bytes

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
    coding = Coding.of(options)
    vector = ((order,), torch.float32)
    matrix = ((order, order), torch.float32)
    failures = ((2,), torch.int32)
    if options.method == "soap":
        basis = _basis_layout(order, options) if options.is_quantized(order) else {"basis": matrix}
        return {"eigenvalues": vector, **basis, "failures": failures}
    if not options.is_quantized(order):
        return {"statistics": matrix, "root": matrix, "failures": failures}
    if options.quantize == "eigenbasis":
        layout = {"eigenvalues": vector, **_basis_layout(order, options)}
    else:
        layout = {"statistics.diagonal": vector, **coding.layout("statistics", order, order)}
    if options.root != "implicit":
        layout.update({"root.diagonal": vector, **coding.layout("root", order, order)})
    return {**layout, "failures": failures}


def _basis_layout(order: int, options: PreconditionerOptions) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """A quantized eigenbasis: rows in ``bits`` bits; some, whose places are ``basis.places``, may be in 8."""
    top, coding = _protected(order, options), Coding.of(options)
    rest = coding.layout("basis", order - top, order)
    if not top:
        return rest
    return {"basis.places": ((top,), torch.int32), **coding.in_8_bits().layout("basis.top", top, order), **rest}


def _protected(order: int, options: PreconditionerOptions) -> int:
    """How many of the leading eigenvectors are in 8 bits."""
    return min(max(1, order // 16), order - 1) if options.protect else 0


def factor_bytes(order: int, options: PreconditionerOptions) -> int:
    """Bytes that one factor keeps."""
    return layout_bytes(factor_layout(order, options))


class InverseRoot(NamedTuple):
    """Inverse roots (k, n, n): ``matrices`` themselves, or eigenvectors as rows and ``powers`` (k, n) of theirs."""

    matrices: Tensor
    powers: Tensor | None

    def left_of(self, blocks: Tensor) -> Tensor:
        """The roots times ``blocks`` (k, n, any)."""
        if self.powers is None:
            return linalg.matmul(self.matrices, blocks)
        seen = linalg.matmul(self.matrices, blocks)
        return linalg.matmul(self.matrices.mT, seen.mul_(self.powers.unsqueeze(-1)))

    def right_of(self, blocks: Tensor) -> Tensor:
        """``blocks`` (k, any, n) times the roots."""
        if self.powers is None:
            return linalg.matmul(blocks, self.matrices)
        seen = linalg.matmul(blocks, self.matrices.mT)
        return linalg.matmul(seen.mul_(self.powers.unsqueeze(-2)), self.matrices)


class FactorPool(Pool):
    """``count`` factors of one ``order``, with the same options, on one device.

    Inverse roots are fourth ones; square ones of factors that are ``alone``, without one on the other side.

    Fresh factors are those of the paper: statistics matrix_eps I, inverse root I. With method="soap" they are the
    identity as a basis, and statistics of zero.
    """

    def __init__(
        self, order: int, count: int, options: PreconditionerOptions, device: torch.device, alone: bool = False
    ) -> None:
        super().__init__(factor_layout(order, options), count, Coding.of(options), device)
        self.order = order
        self.options = options
        self._root = 2 if alone else 4
        self.refresh_dtype: torch.dtype = getattr(torch, options.refresh_dtype)
        # A basis that is stored in float32 is orthogonal.
        self._rectify_steps = (0, 0) if "basis" in self.tensors else options.rectify_steps
        self._top = _protected(order, options) if "basis.top.codes" in self.tensors else 0
        self.has_roots = "root" in self.tensors or "root.diagonal" in self.tensors
        identity = torch.eye(order, dtype=torch.float32, device=device).unsqueeze(0)
        if self.has_roots:
            self._initialize("root", identity)
        if "eigenvalues" in self.tensors:
            self.tensors["eigenvalues"].fill_(0.0 if options.method == "soap" else options.matrix_eps)
            self._initialize("basis", identity)
        else:
            self._initialize("statistics", options.matrix_eps * identity)

    def _initialize(self, name: str, matrix: Tensor) -> None:
        eigenvalues = torch.zeros_like(matrix[:, 0])
        encoded = self._encode_basis(matrix, eigenvalues) if name == "basis" else self.encode(name, matrix)
        for key, value in encoded.items():
            self.tensors[key].copy_(value.expand_as(self.tensors[key]))

    def _encode_basis(self, rows: Tensor, eigenvalues: Tensor) -> dict[str, Tensor]:
        """The stored form of eigenvectors, which are ``rows`` (k, n, n), with eigenvalues (k, n).

        Leading ones stay in their places: a coordinate without gradients must stay on the diagonal, or the next QR
        would mix it with others.
        """
        if not self._top:
            return self.encode("basis", rows)
        places = eigenvalues.argsort(dim=1, descending=True, stable=True)[:, : self._top].sort(1).values
        order = _leading_first(places, self.order).unsqueeze(-1).expand_as(rows)
        leading, rest = rows.gather(1, order).split([self._top, self.order - self._top], dim=1)
        codes = self.encode("basis.top", leading, self.coding.in_8_bits())
        return {"basis.places": places.to(torch.int32), **codes, **self.encode("basis", rest)}

    def _decode_basis(self, where: Index, dtype: torch.dtype = torch.float32) -> Tensor:
        """The eigenvectors as rows (k, n, n), of ``dtype`` unless they are stored in float32.

        Where the leading ones are kept apart, all are float32, and the others are made orthogonal to the leading ones.
        """
        if not self._top:
            return self.decode("basis", where, self.order, dtype=dtype)
        rows = self.decode("basis", where, self.order)
        leading = self.decode("basis.top", where, self.order, self.coding.in_8_bits())
        rows = linalg.add_product(1.0, rows, -1.0, linalg.matmul(rows, leading.mT), leading)
        found = torch.empty(len(rows), self.order, self.order, dtype=rows.dtype, device=rows.device)
        order = _leading_first(self.stored("basis.places", where).long(), self.order).unsqueeze(-1).expand_as(found)
        for part, places in zip((leading, rows), order.split([self._top, self.order - self._top], dim=1), strict=True):
            found.scatter_(1, places, part)
        return found

    # -- the algorithm -------------------------------------------------------------------------------------------------

    def _commit(self, where: Index, new: dict[str, Tensor], kind: int, wanted: Tensor | None = None) -> Tensor:
        """Store ``new`` for the factors whose numbers are finite; the others keep what they had, and are counted.

        ``wanted`` (k,) tells which factors are to change at all; None means all of them. Returns which have changed.
        """
        finite = torch.stack([_finite(value) for value in new.values() if value.is_floating_point()]).all(0)
        changed = finite if wanted is None else finite & wanted
        for name, value in new.items():
            old = self.tensors[name]
            replaced = changed.view(-1, *[1] * (value.ndim - 1))
            old[where] = torch.where(replaced, value, old[where])
        failures = self.tensors["failures"][:, kind]
        failures[where] = torch.where(finite, 0, failures[where] + 1)
        return changed

    @property
    def roots_are_fresh(self) -> bool:
        """Whether :meth:`absorb` can compute roots, of the new eigenbasis before it is quantized."""
        return self.has_roots and "eigenvalues" in self.tensors and self.options.root == "stored"

    def absorb(self, where: Tensor, gradients: Tensor, *, with_roots: bool = False) -> None:
        """Statistics step: absorb G G^T of each of ``gradients`` (k, n, any) into the factors ``where``.

        ``with_roots`` recomputes inverse roots too.

        A gradient of zeros leaves its factor as it is, as a gradient that is missing does. If the average decayed
        instead, the first gradient of a layer that wakes up would be scaled without bound.
        """
        beta = self.options.shampoo_beta
        for chunk, gradient in self._gradients(where, gradients):
            statistic = linalg.matmul(gradient, gradient.mT)
            if "eigenvalues" in self.tensors:
                values, rows = self._eigenbasis(chunk, self._rectify_steps[0])
                iterations = self.options.refresh_iterations
                new_values, new_rows = eigenbasis.refresh(values, rows, statistic, beta, iterations)
                new = self._encoded(new_values, new_rows)
            else:
                old = self.decode("statistics", chunk, self.order).to(self.refresh_dtype)
                new = self.encode("statistics", beta * old + (1 - beta) * statistic)
            changed = self._commit(chunk, new, _STATISTICS, gradient.flatten(1).any(1))
            if with_roots:
                values = torch.where(changed.view(-1, 1), new_values, values)
                self._commit_roots(chunk, values, torch.where(changed.view(-1, 1, 1), new_rows, rows))

    def turn(self, where: Tensor, gradients: Tensor, bases: Tensor) -> Tensor:
        """Absorb ``gradients`` as :meth:`absorb` does, into factors with method="soap".

        Args:
            where: the factors.
            gradients: of each, (k, n, any).
            bases: what :meth:`basis` gives for them, (k, n, n). The new ones, before they are quantized, take their
                place.

        Returns:
            the rotations V_new^T V_old, (k, n, n); the identity for factors that have not changed.
        """
        options, rotations, size = self.options, torch.empty_like(bases), self._chunk_size()
        alike = (self._rectify_steps[0], self.refresh_dtype) == (self._rectify_steps[1], bases.dtype)
        identity = torch.eye(self.order, dtype=bases.dtype, device=bases.device)
        parts = zip(self._gradients(where, gradients), bases.split(size), rotations.split(size), strict=True)
        for (chunk, gradient), rows, rotation in parts:
            values = options.shampoo_beta * self.tensors["eigenvalues"][chunk].to(self.refresh_dtype)
            old = rows if alike else self._eigenbasis(chunk, self._rectify_steps[0])[1]
            statistic = linalg.matmul(gradient, gradient.mT).mul_(1 - options.shampoo_beta)
            new = eigenbasis.turn(values, old, statistic, options.matrix_eps, options.refresh_iterations)
            del statistic  # before the codes take memory
            encoded = self._encoded(new.eigenvalues, new.rows)
            changed = self._commit(chunk, encoded, _STATISTICS, gradient.flatten(1).any(1)).view(-1, 1, 1)
            new_rows = new.rows.to(rows.dtype)
            turned = new.rotation if alike else linalg.matmul(new_rows, rows.mT)
            torch.where(changed, turned, identity, out=rotation)
            torch.where(changed, new_rows, rows, out=rows)
        return rotations

    def _gradients(self, where: Tensor, gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``where`` and ``gradients`` in parts, as many factors at a time as scratch memory is for."""
        for chunk, gradient in zip(self._chunks(where), gradients.split(self._chunk_size()), strict=True):
            yield chunk, gradient.to(self.refresh_dtype)

    def _encoded(self, eigenvalues: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"eigenvalues": eigenvalues.to(torch.float32), **self._encode_basis(rows, eigenvalues)}

    def _commit_roots(self, where: Tensor, eigenvalues: Tensor, rows: Tensor) -> None:
        root = eigenbasis.inverse_root(eigenvalues, rows, self.options.matrix_eps, self._root)
        self._commit(where, self.encode("root", root), _ROOT)

    def invert(self, where: Tensor) -> None:
        """Root step: recompute the inverse roots of the factors ``where``, if they are stored."""
        if not self.has_roots:
            return
        for chunk in self._chunks(where):
            if "eigenvalues" in self.tensors:
                self._commit_roots(chunk, *self._eigenbasis(chunk, self._rectify_steps[1]))
            else:
                statistics = self.decode("statistics", chunk, self.order).to(self.refresh_dtype)
                root = eigenbasis.inverse_root_of(statistics, self.options.matrix_eps, self._root)
                self._commit(chunk, self.encode("root", root), _ROOT)

    def root(self, where: Index, dtype: torch.dtype) -> InverseRoot:
        """The inverse roots (k, n, n) of the factors ``where``, to multiply with blocks of ``dtype``."""
        if self.has_roots:
            return InverseRoot(self.decode("root", where, self.order, dtype=dtype).to(dtype), None)
        powers = eigenbasis.inverse_powers(self.tensors["eigenvalues"][where], self.options.matrix_eps, self._root)
        return InverseRoot(self.basis(where, dtype), powers.to(dtype))

    def basis(self, where: Index, dtype: torch.dtype) -> Tensor:
        """The eigenvectors (k, n, n) of the factors ``where``, as rows, to multiply with blocks of ``dtype``."""
        steps = self._rectify_steps[1]
        rows = self._decode_basis(where, torch.float32 if steps else dtype)
        if "basis" in self.tensors:
            return rows.to(dtype, copy=True)  # a view of what absorb() changes
        return eigenbasis.rectify(rows, steps).to(dtype)

    def health(self, where: Tensor) -> Tensor:
        """How the factors ``where`` are, float64 (k, 5): see HEALTH. NaN for the errors of factors without a basis."""
        rows = []
        for chunk in self._chunks(where):
            if "eigenvalues" in self.tensors:
                values, stored = self._eigenbasis(chunk, 0)
                errors = [_orthogonality_error(stored)]
                errors.append(_orthogonality_error(eigenbasis.rectify(stored, self._rectify_steps[1])))
            else:
                values, _ = linalg.eigh(self.decode("statistics", chunk, self.order).to(self.refresh_dtype))
                errors = [torch.full_like(values[:, 0], torch.nan)] * 2
            failures = self.tensors["failures"][chunk].amax(1)
            rows.append(torch.stack([*errors, values.amin(1), values.amax(1), failures.to(values.dtype)], dim=1))
        return torch.cat(rows).double()

    def _eigenbasis(self, where: Index, rectify_steps: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k, n), and eigenvectors as rows (k, n, n), in the type of refreshes."""
        rows = self._decode_basis(where).to(self.refresh_dtype)
        return self.tensors["eigenvalues"][where].to(self.refresh_dtype), eigenbasis.rectify(rows, rectify_steps)

    def _chunk_size(self) -> int:
        return max(1, REFRESH_ELEMENTS_PER_MIB * self.options.scratch_on(self.device) // self.order**2)

    def _chunks(self, where: Tensor) -> Iterator[Tensor]:
        return iter(where.split(self._chunk_size()))

    def worst_failures(self) -> Tensor:
        """The most failures in a row of any factor: one number on the device."""
        return self.tensors["failures"].max()


def _leading_first(places: Tensor, order: int) -> Tensor:
    """All places of ``order`` eigenvectors (k, order): first those in ``places`` (k, some), then the others."""
    rest = torch.ones(len(places), order, dtype=torch.int8, device=places.device).scatter_(1, places, 0)
    return rest.argsort(dim=1, stable=True)


def _orthogonality_error(rows: Tensor) -> Tensor:
    gram = linalg.matmul(rows, rows.mT)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    error: Tensor = torch.linalg.vector_norm(gram, dim=(1, 2)) / rows.shape[-1] ** 0.5
    return error


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)
