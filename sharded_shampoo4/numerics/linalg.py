"""Products and factorizations of batches of matrices whose numbers do not depend on the batch.

A block must get the same numbers whether it is computed alone or beside others, or ranks that share the work
differently would train different models. Libraries do not promise that. MKL chooses its kernels by memory alignment,
which the place in a batch decides where a matrix does not fill whole cache lines, and by how a batch divides over
threads; CUDA's choose by batch size. So matrices go into one call where that is known to be neutral, and one by one
where it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CACHE_LINE = 64  # bytes; torch aligns fresh CPU memory to it
# Of cholesky_qr: the share of the start that is added to columns of length 1, more than float32 rounds there.
_OF_START = 1e-6
# Rounds with a shift and without, enough for matrices of any rank up to order 1024.
_SHIFTED_ROUNDS, _ROUNDS = 3, 2
_ORTHOGONAL = 1e-3  # the largest element of Q^T Q - I of an orthogonal factor
_SOLVERS = ("cusolver", "hipsolver", "rocsolver", "magma", "lapack", "mkl", "linalg.")
_NOT_ABOUT_NUMBERS = ("alloc", "memory", "initialized", "not implemented", "not compiled")


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(B, m, k) times (B, k, n)."""
    if _is_neutral(left, right):
        return torch.bmm(left, right)
    return torch.stack([torch.mm(_aligned(a), _aligned(b)) for a, b in zip(left, right, strict=True)])


def add_product(beta: float, matrices: Tensor, alpha: float, left: Tensor, right: Tensor) -> Tensor:
    """``beta matrices + alpha left right``; ``matrices`` are (B, m, n), the product is :func:`matmul`'s."""
    if left.device.type != "cpu" and _is_neutral(left, right):
        return torch.baddbmm(matrices, left, right, beta=beta, alpha=alpha)
    product, scaled = matmul(left, right), matrices if beta == 1 else matrices * beta
    if alpha == -1:
        return torch.sub(scaled, product, out=product)
    return (product if alpha == 1 else product.mul_(alpha)).add_(scaled)


def _is_neutral(left: Tensor, right: Tensor) -> bool:
    """Whether the product of a batch gives each matrix the numbers that it would get alone."""
    if left.device.type != "cpu":
        return not torch.are_deterministic_algorithms_enabled()
    shapes = left.shape[1:], right.shape[1:], (left.shape[1], right.shape[2])
    return torch.get_num_threads() == 1 and all(_fills_cache_lines(shape, left.dtype) for shape in shapes)


def qr(matrices: Tensor, start: Tensor) -> Tensor:
    """The orthogonal factors of (B, n, n) matrices, up to the signs of columns; NaN where that fails.

    Transposes of contiguous matrices are factorized without a copy that transposes, and such come back.

    On accelerators LAPACK's algorithm launches thousands of small kernels, so matrices in float32 take
    :func:`cholesky_qr` there, with a ``start``.
    """
    return cholesky_qr(matrices, start) if _suits_cholesky(matrices) else _householder(matrices)


def cholesky_qr(matrices: Tensor, start: Tensor) -> Tensor:
    """The orthogonal factors of (B, n, n) matrices by products, Cholesky factorizations and triangular solves.

    From columns of length 1, rounds of Q <- Q R^-1 with Q^T Q + shift I = R^T R (Fukaya et al., SIAM J. Sci. Comput.
    42, 2020). The shift is above what float32 rounds in Q^T Q, so that the factorization succeeds; each such round
    makes small singular values about 1 / sqrt(shift) times as large. Without a shift the last rounds make Q orthogonal.

    A ``start`` (B, n, n) has nearly orthogonal columns of length about 1. A millionth of them is added to those of the
    matrices, so that singular values are not much smaller, and where columns depend on one another, or are zeros, the
    start decides the remaining directions.

    Nothing is read back from the device. Where a factor is not orthogonal, as of numbers that are not finite, all of it
    is NaN.
    """
    precision = torch.finfo(matrices.dtype)
    shift = 10 * matrices.shape[-1] ** 0.5 * precision.eps
    found = matrices / matrices.abs().amax(1, keepdim=True).clamp_min(precision.tiny)  # whose squares are not too small
    found /= torch.linalg.vector_norm(found, dim=1, keepdim=True).clamp_min(precision.tiny)
    found.add_(start, alpha=_OF_START)
    gram = matmul(found.mT, found)
    for number in range(_SHIFTED_ROUNDS + _ROUNDS):
        if number < _SHIFTED_ROUNDS:
            gram.diagonal(dim1=1, dim2=2).add_(shift)
        factor, _ = torch.linalg.cholesky_ex(gram)
        found = torch.linalg.solve_triangular(factor.mT, found, upper=True, left=False)
        gram = matmul(found.mT, found)
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    orthogonal = gram.abs().amax((1, 2)) < _ORTHOGONAL  # false where a number is NaN
    return torch.where(orthogonal.view(-1, 1, 1), found, torch.nan)


def _suits_cholesky(matrices: Tensor) -> bool:
    exact = torch.are_deterministic_algorithms_enabled()
    return matrices.device.type != "cpu" and matrices.dtype == torch.float32 and not exact


def _householder(matrices: Tensor) -> Tensor:
    return _factorize(lambda rows: (_orthogonal_factors(rows.mT).mT,), matrices.mT)[0].mT


def _orthogonal_factors(matrices: Tensor) -> Tensor:
    on_cpu = matrices.device.type == "cpu"  # the same bits, without making R
    found: Tensor = torch.linalg.householder_product(*torch.geqrf(matrices)) if on_cpu else torch.linalg.qr(matrices)[0]
    return found


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, n) of symmetric matrices, and eigenvectors as rows (B, n, n); NaN where LAPACK fails."""
    rows, values = _factorize(_decompose, matrices)
    return values, rows


def _decompose(matrices: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrices)
    return vectors.mT, values


def _factorize(method: Callable[[Tensor], tuple[Tensor, ...]], matrices: Tensor) -> tuple[Tensor, ...]:
    """``method`` on a batch, or on one matrix after another, where a batch is not neutral or fails."""
    if matrices.device.type == "cpu":
        neutral = _fills_cache_lines(matrices.shape[1:], matrices.dtype)
    else:
        neutral = not torch.are_deterministic_algorithms_enabled()
    if neutral or len(matrices) == 1:
        try:
            return tuple(part.contiguous() for part in method(matrices))  # as torch.cat below lays them out
        except RuntimeError as error:
            if not _is_about_numbers(error):
                raise
            if len(matrices) == 1:
                return matrices * torch.nan, matrices[:, 0] * torch.nan
    singly = [_factorize(method, matrix) for matrix in matrices.split(1)]
    return tuple(torch.cat(parts) for parts in zip(*singly, strict=False))  # a failed QR brings a part too many


def _is_about_numbers(error: RuntimeError) -> bool:
    """Whether a solver has failed on what it was given: it may succeed on other matrices.

    cuSOLVER and its kin report some of these as internal errors, which torch raises as RuntimeError.
    """
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return True
    text = str(error).lower()
    return (
        not isinstance(error, torch.OutOfMemoryError)
        and any(solver in text for solver in _SOLVERS)
        and not any(cause in text for cause in _NOT_ABOUT_NUMBERS)
    )


def _fills_cache_lines(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return torch.Size(shape).numel() * dtype.itemsize % _CACHE_LINE == 0


def _aligned(matrix: Tensor) -> Tensor:
    return matrix.clone() if matrix.device.type == "cpu" and matrix.data_ptr() % _CACHE_LINE else matrix
