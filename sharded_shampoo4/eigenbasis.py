"""The mathematics of a preconditioner kept as eigenvalues and an eigenbasis (Wang et al., NeurIPS 2024, section 3).

Pure functions on batches of matrices, shape (B, n, n); eigenvectors are columns. Whatever a function computes for one
matrix does not depend on the others in its batch. A matrix whose factorisation fails comes back as NaN and the others
are unharmed; nothing here raises on bad numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST = torch.finfo(torch.float32).tiny


def rectify(basis: Tensor, steps: int) -> Tensor:
    """Bring a nearly orthogonal ``basis`` back towards orthogonality by ``steps`` of Björck's iteration.

    V <- 1.5 V - 0.5 V V^T V (the paper's equation for orthogonality rectification).
    """
    for _ in range(steps):
        basis = 1.5 * basis - 0.5 * (basis @ (basis.mT @ basis))
    return basis


def refresh(eigenvalues: Tensor, basis: Tensor, statistic: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Absorb a statistic, G G^T or G^T G, into eigenvalues (B, n) and ``basis`` (B, n, n): Algorithm 1.

    A = beta V diag(eigenvalues) V^T + (1 - beta) statistic; one step of orthogonal iteration, P = QR(A V), started from
    the old basis. Returns the Rayleigh quotients diag(P^T A P) and P.
    """
    average = beta * ((basis * eigenvalues.unsqueeze(-2)) @ basis.mT) + (1 - beta) * statistic
    new_basis = _factorise(_qr, average @ basis)[0]
    return (new_basis * (average @ new_basis)).sum(-2), new_basis


def inverse_root(eigenvalues: Tensor, basis: Tensor, matrix_eps: float) -> Tensor:
    """V (diag(eigenvalues) + matrix_eps lambda_max I)^(-1/4) V^T: Algorithm 2.

    Eigenvalues are clamped at 0 before the ridge is added, and the sum at the smallest normal float32, so that the root
    of a zero matrix is finite.
    """
    eigenvalues = eigenvalues.clamp_min(0.0)
    ridge = matrix_eps * eigenvalues.amax(-1, keepdim=True)
    powers = (eigenvalues + ridge).clamp_min(_SMALLEST).pow(-0.25)
    return (basis * powers.unsqueeze(-2)) @ basis.mT


def inverse_root_of(matrices: Tensor, matrix_eps: float) -> Tensor:
    """:func:`inverse_root` of symmetric ``matrices`` (B, n, n) themselves, decomposed by eigh."""
    vectors, values = _factorise(_eigh, matrices)
    return inverse_root(values.squeeze(-2), vectors, matrix_eps)


def _qr(matrices: Tensor) -> tuple[Tensor, ...]:
    return (torch.linalg.qr(matrices)[0],)


def _eigh(matrices: Tensor) -> tuple[Tensor, ...]:
    values, vectors = torch.linalg.eigh(matrices)
    return vectors, values.unsqueeze(-2)


def _factorise(method: Callable[[Tensor], tuple[Tensor, ...]], matrices: Tensor) -> tuple[Tensor, ...]:
    """``method`` on a batch (B, n, n). If LAPACK gives up on it, one matrix at a time; those that fail become NaN."""
    try:
        return method(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(matrices) == 1:
            return matrices * torch.nan, matrices[:, :1] * torch.nan
        singly = [_factorise(method, matrix) for matrix in matrices.split(1)]
        return tuple(torch.cat(parts) for parts in zip(*singly, strict=False))
