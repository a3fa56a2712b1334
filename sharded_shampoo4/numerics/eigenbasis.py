"""The mathematics of a preconditioner kept as eigenvalues and an eigenbasis (Wang et al., NeurIPS 2024, section 3).

Pure functions on batches of matrices, shape (B, n, n). The ``rows`` of a basis are its eigenvectors: V is their
transpose. A matrix whose factorization fails comes back as NaN and the others are unharmed; nothing here raises on bad
numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import linalg

_SMALLEST = torch.finfo(torch.float32).tiny
_SMALLEST_NORM = 1e-7  # of a matrix that orthogonalize() brings to norm 1; torch's Muon has the same


def rectify(rows: Tensor, steps: int) -> Tensor:
    """Bring a nearly orthogonal basis back towards orthogonality by ``steps`` of Björck's iteration.

    V <- 1.5 V - 0.5 V V^T V (the paper's equation for orthogonality rectification), which is the same for rows.
    """
    for _ in range(steps):
        rows = linalg.add_product(1.5, rows, -0.5, linalg.matmul(rows, rows.mT), rows)
    return rows


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Bring the singular values of ``matrices`` (B, m, n) close to 1, by ``steps`` of Muon's Newton-Schulz iteration.

    X <- 3.4445 X - 4.775 X X^T X + 2.0315 (X X^T)^2 X, from X / ||X||_F. Five steps leave singular values between about
    0.7 and 1.2. Zeros stay zeros, and what is nearly zero stays small: squares of elements would underflow.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT.contiguous()
    # Norms of rows first: so they do not depend on the batch.
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(wide, dim=2), dim=1).view(-1, 1, 1)
    found: Tensor = wide / norms.clamp_min(_SMALLEST_NORM)
    for _ in range(steps):
        gram = linalg.matmul(found, found.mT)
        factor = linalg.add_product(-4.775, gram, 2.0315, gram, gram)
        found = linalg.add_product(3.4445, found, 1.0, factor, found)
    return found if wide is matrices else found.mT


def refresh(
    eigenvalues: Tensor, rows: Tensor, statistic: Tensor, beta: float, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """Absorb a statistic, G G^T or G^T G, into eigenvalues (B, n) and a basis: Algorithm 1.

    A = beta V diag(eigenvalues) V^T + (1 - beta) statistic; one step of orthogonal iteration, P = QR(A V), started from
    the old basis, or several, P = QR(A P). Returns the Rayleigh quotients diag(P^T A P), and P as rows.
    """
    average = linalg.add_product(1 - beta, statistic, beta, (rows * eigenvalues.unsqueeze(-1)).mT, rows)
    image = linalg.matmul(rows, average)
    for _ in range(iterations):
        rows = linalg.qr(image.mT, rows.mT).mT
        image = linalg.matmul(rows, average)
    return (rows * image).sum(-1), rows


class Turned(NamedTuple):
    """Eigenvalues (B, n) and a new basis as rows (B, n, n), and the ``rotation`` P^T V from the old one V to this P."""

    eigenvalues: Tensor
    rows: Tensor
    rotation: Tensor


def turn(eigenvalues: Tensor, rows: Tensor, statistic: Tensor, ridge: float, iterations: int = 1) -> Turned:
    """Absorb a statistic as :func:`refresh` does, but without decays: A = V diag(eigenvalues) V^T + statistic.

    The old basis is taken for orthogonal, so that A V = V diag(eigenvalues) + statistic V, and A itself is not needed.

    The iteration is that of A + ridge max(eigenvalues + diag(statistic)) I, which has the same eigenvectors: those of
    eigenvalues far below the ridge stay as they are, instead of following rounding errors. This maximum lies between
    the larger one of the eigenvalues and the diagonal and twice that.
    """
    old, values = rows, eigenvalues.unsqueeze(-2)
    shift = ridge * (values + statistic.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)).amax(-1, keepdim=True)
    image = linalg.add_product(1.0, rows * (values.mT + shift), 1.0, rows, statistic)
    for number in range(1, iterations + 1):
        rows = linalg.qr(image.mT, rows.mT).mT
        rotation, image = linalg.matmul(rows, old.mT), linalg.matmul(rows, statistic)
        if number < iterations:
            image = linalg.add_product(1.0, image, 1.0, rotation * values, old) + shift * rows
    return Turned(rotation.square().mul_(values).add_(image.mul_(rows)).sum(-1), rows, rotation)


def inverse_root(eigenvalues: Tensor, rows: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """V (diag(eigenvalues) + matrix_eps lambda_max I)^(-1/root) V^T: Algorithm 2; ``root`` is 4 or 2.

    Eigenvalues are clamped at 0 before the ridge is added, and the sum at the smallest normal float32, so that the root
    of a zero matrix is finite.
    """
    return linalg.matmul((rows * inverse_powers(eigenvalues, matrix_eps, root).unsqueeze(-1)).mT, rows)


def inverse_powers(eigenvalues: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """(eigenvalues + matrix_eps lambda_max)^(-1/root) of eigenvalues (B, n): see :func:`inverse_root`."""
    eigenvalues = eigenvalues.clamp_min(0.0)
    ridge = matrix_eps * eigenvalues.amax(-1, keepdim=True)
    # Not pow: its rounding depends on where a value stands in memory, that of roots and quotients does not.
    found = (eigenvalues + ridge).clamp_min(_SMALLEST).sqrt()
    return found.reciprocal() if root == 2 else found.sqrt().reciprocal()


def inverse_root_of(matrices: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """:func:`inverse_root` of symmetric ``matrices`` (B, n, n) themselves, decomposed by eigh.

    A coordinate whose off-diagonal elements are all zero, as that of a row that never had a gradient, has zeros there
    in the root too. eigh alone would leave rounding errors, which a base optimizer that normalizes makes large.
    """
    found = inverse_root(*linalg.eigh(matrices), matrix_eps, root)
    diagonal = torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))
    connected = (matrices != 0).sum(-1) > (matrices.diagonal(dim1=-2, dim2=-1) != 0)
    return torch.where(connected.unsqueeze(-1) & connected.unsqueeze(-2), found, diagonal)
