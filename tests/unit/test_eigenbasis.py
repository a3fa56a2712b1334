"""The mathematics of a factor: accuracy of stored inverse roots, and numbers that go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharded_shampoo4.numerics import eigenbasis, linalg, quantization

ORDER = 1200


def random_basis(order: int) -> Tensor:
    return torch.linalg.qr(torch.randn(order, order, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
        0
    ]


SPECTRA: dict[str, Callable[[], Tensor]] = {
    # As in the paper's table 1: a few eigenvalues of 1, the others 1000, so that A^(-1/4) has two very different parts.
    "two values": lambda: torch.where(torch.arange(ORDER) < (1000 / 0.02) ** -0.25 * ORDER, 1.0, 1000.0).double(),
    "log-uniform": lambda: torch.logspace(-3, 3, ORDER, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_of_the_inverse_root(spectrum: str) -> None:
    """Table 1 of the paper: quantizing the eigenbasis beats quantizing the matrix, and rectifying beats that."""
    values, basis = SPECTRA[spectrum]()[None], random_basis(ORDER)[None]
    options = {"codebook": "linear2", "bits": 4, "block": 64}

    def stored(matrix: Tensor) -> Tensor:
        return quantization.dequantize(*quantization.quantize(matrix, **options), ORDER, **options).double()

    def root(matrix: Tensor) -> Tensor:
        return eigenbasis.inverse_root_of(matrix, 1e-6)

    matrix = (basis * values[:, None]) @ basis.mT
    exact = eigenbasis.inverse_root(values, basis.mT, 1e-6)
    off_diagonal = matrix - matrix.diagonal(dim1=-2, dim2=-1).diag_embed()
    rough = stored(basis.mT).mT
    rectified = eigenbasis.rectify(rough, 4)
    errors = {
        "naive": root(stored(off_diagonal) + matrix - off_diagonal),
        "eigenbasis": root((rough * values[:, None]) @ rough.mT),
        "rectified": root((rectified * values[:, None]) @ rectified.mT),
    }
    errors = {name: ((found - exact).norm() / exact.norm()).item() for name, found in errors.items()}
    print(spectrum, errors)
    assert errors["naive"] > 5 * errors["eigenbasis"]
    assert 0.6 < errors["rectified"] / errors["eigenbasis"] < 0.75
    assert errors["rectified"] < 0.08


def test_refresh_converges_to_the_eigenvectors() -> None:
    basis = random_basis(8)[None]
    statistic = (basis * torch.logspace(0, 3, 8, dtype=torch.float64)[None, None]) @ basis.mT
    values, found = torch.full((1, 8), 1e-6, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[None]
    for _ in range(200):
        values, found = eigenbasis.refresh(values, found, statistic, 0.9)
    error = found.mT @ (found * values[..., None]) - statistic
    assert error.norm() < 1e-6 * statistic.norm()


def test_a_failing_matrix_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK raises for a whole batch; the others are computed again and only the bad one is lost."""
    matrices = torch.randn(3, 16, 16, dtype=torch.float64)
    matrices = matrices @ matrices.mT
    expected = eigenbasis.inverse_root_of(matrices, 1e-6)
    matrices[1] = torch.nan
    found = eigenbasis.inverse_root_of(matrices, 1e-6)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().all()

    real = torch.geqrf

    def fails_on_a_marked_matrix(batch: Tensor) -> tuple[Tensor, Tensor]:
        if (batch[:, 0, 0] == 7).any():
            raise torch.linalg.LinAlgError("injected")
        return real(batch)

    monkeypatch.setattr(torch, "geqrf", fails_on_a_marked_matrix)
    matrices = torch.randn(3, 16, 16)
    matrices[2, 0, 0] = 7
    found = linalg.qr(matrices, torch.eye(16))
    assert torch.equal(found[:2], torch.linalg.qr(matrices[:2])[0]) and found[2].isnan().all()


def test_zero_and_negative_eigenvalues_have_finite_roots() -> None:
    basis = random_basis(8)[None]
    for values in (torch.zeros(1, 8), torch.tensor([[-1.0, 0, 1e-30, 1e-10, 1, 2, 3, 4]])):
        assert eigenbasis.inverse_root(values.double(), basis, 1e-6).float().isfinite().all()
