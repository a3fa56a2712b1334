"""The mathematics of a preconditioner kept as eigenvalues and an eigenbasis (Wang et al., NeurIPS 2024, section 3).

Pure functions on batches of matrices, shape (B, n, n); eigenvectors are columns. A matrix whose factorization fails
comes back as NaN and the others are unharmed; nothing here raises on bad numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linalg

_SMALLEST = torch.finfo(torch.float32).tiny


def rectify(basis: Tensor, steps: int) -> Tensor:
    """Bring a nearly orthogonal ``basis`` back towards orthogonality by ``steps`` of Björck's iteration.

    V <- 1.5 V - 0.5 V V^T V (the paper's equation for orthogonality rectification). Eigenvectors may be rows.
    """
    for _ in range(steps):
        basis = linalg.add_product(1.5, basis, -0.5, linalg.matmul(basis, basis.mT), basis)
    return basis


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Bring the singular values of ``matrices`` (B, m, n) close to 1, by ``steps`` of Muon's Newton-Schulz iteration.

    X <- 3.4445 X - 4.775 X X^T X + 2.0315 (X X^T)^2 X, from X / ||X||_F. Five steps leave singular values between about
    0.7 and 1.2. Zeros stay zeros.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT.contiguous()
    # Norms of rows first: so they do not depend on the batch.
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(wide, dim=2), dim=1).view(-1, 1, 1)
    found: Tensor = wide / (norms + torch.finfo(norms.dtype).tiny)
    for _ in range(steps):
        gram = linalg.matmul(found, found.mT)
        factor = linalg.add_product(-4.775, gram, 2.0315, gram, gram)
        found = linalg.add_product(3.4445, found, 1.0, factor, found)
    return found if wide is matrices else found.mT


def refresh(
    eigenvalues: Tensor,
    basis: Tensor,
    statistic: Tensor,
    beta: float,
    iterations: int = 1,
    ridge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Absorb a statistic, G G^T or G^T G, into eigenvalues (B, n) and ``basis`` (B, n, n): Algorithm 1.

    A = beta V diag(eigenvalues) V^T + (1 - beta) statistic; one step of orthogonal iteration, P = QR(A V), started from
    the old basis, or several, P = QR(A P). Returns the Rayleigh quotients diag(P^T A P) and P.

    With a ``ridge`` the iteration is that of A + ridge max(diag(A)) I, which has the same eigenvectors: those of
    eigenvalues far below the ridge stay as they are, instead of following rounding errors.
    """
    average = linalg.add_product(1 - beta, statistic, beta, basis * eigenvalues.unsqueeze(-2), basis.mT)
    image = linalg.matmul(average, basis)
    shift = ridge * average.diagonal(dim1=-2, dim2=-1).amax(-1).view(-1, 1, 1) if ridge else None
    for _ in range(iterations):
        basis = linalg.qr(image if shift is None else image + shift * basis, basis)
        image = linalg.matmul(average, basis)
    return (basis * image).sum(-2), basis


def inverse_root(eigenvalues: Tensor, basis: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """V (diag(eigenvalues) + matrix_eps lambda_max I)^(-1/root) V^T: Algorithm 2; ``root`` is 4 or 2.

    Eigenvalues are clamped at 0 before the ridge is added, and the sum at the smallest normal float32, so that the root
    of a zero matrix is finite.
    """
    return linalg.matmul(basis * inverse_powers(eigenvalues, matrix_eps, root).unsqueeze(-2), basis.mT)


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
