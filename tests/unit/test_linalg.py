"""Orthogonal factors by Cholesky factorizations, which accelerators use: like those of QR, or NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.directions import Directions, replayed
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.numerics import linalg


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def like_a_refresh(order: int, angle: float) -> tuple[Tensor, Tensor]:
    """A V, of two matrices A with eigenvalues over six orders of magnitude, and V, ``angle`` from the eigenvectors."""
    exact = torch.linalg.qr(random(2, order, order).double())[0]
    average = (exact * torch.logspace(0, -6, order, dtype=torch.float64)) @ exact.mT
    near = torch.linalg.qr(exact + angle / order**0.5 * random(2, order, order, seed=1).double())[0]
    return (average @ near + 1e-6 * near).float(), near.float()


@pytest.mark.parametrize("angle", [0.0, 1e-3, 3e-2])
@pytest.mark.parametrize("order", [3, 64, 300])
def test_factors_are_those_of_qr(order: int, angle: float) -> None:
    matrices, start = like_a_refresh(order, angle)
    found = linalg.cholesky_qr(matrices, start)
    exact, upper = torch.linalg.qr(matrices.double())
    exact *= upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(found.mT @ found, torch.eye(order).expand(2, -1, -1), rtol=0, atol=1e-5)
    # Small columns are sums of large numbers, in which float32 has errors of its own.
    own = torch.linalg.qr(matrices)[0] * torch.linalg.qr(matrices)[1].diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    assert (found - exact).abs().max() <= 4 * (own - exact).abs().max() + 1e-5


def test_coordinates_without_gradients_stay_exact() -> None:
    matrices = torch.zeros(1, 40, 40)
    start = torch.eye(40).unsqueeze(0)
    matrices[:, :30, :30], start[:, :30, :30] = (part[:1] for part in like_a_refresh(30, 1e-2))
    matrices[:, 30:, 30:] = 1e-9 * torch.eye(10)
    found = linalg.cholesky_qr(matrices, start)
    assert torch.equal(found[:, 30:, 30:], torch.eye(10).unsqueeze(0))
    assert not found[:, 30:, :30].any() and not found[:, :30, 30:].any()


@pytest.mark.parametrize("order", [32, 256])
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("rank", [1, 10])
def test_matrices_of_low_rank(rank: int, ridge: float, order: int) -> None:
    """As statistics are at first. The leading columns are those of QR."""
    gradients = random(4, order, rank)
    average = gradients @ gradients.mT
    matrices = average + ridge * average.diagonal(dim1=-2, dim2=-1).amax(-1).view(-1, 1, 1) * torch.eye(order)
    found, exact = linalg.cholesky_qr(matrices, torch.eye(order)), torch.linalg.qr(matrices.double())[0].float()
    torch.testing.assert_close(found.mT @ found, torch.eye(order).expand(4, -1, -1), rtol=0, atol=1e-5)
    assert ((found * exact).sum(1)[:, :1].abs() > 0.999).all()


@pytest.mark.parametrize("order", [32, 256])
@pytest.mark.parametrize("turned", [False, True])
def test_columns_without_a_direction_take_that_of_the_start(turned: bool, order: int) -> None:
    start = torch.linalg.qr(random(3, order, order))[0] if turned else torch.eye(order).repeat(3, 1, 1)
    gradients = random(3, order, order)
    gradients[0] = 0
    gradients[1] = random(1, order)  # all rows are equal, and so are all columns of the product
    gradients[2, 5:] = 0
    found = linalg.cholesky_qr(gradients @ gradients.mT @ start, start)
    torch.testing.assert_close(found.mT @ found, torch.eye(order).expand(3, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], start[0])


def test_gradients_too_small_for_their_squares_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_suits_cholesky", lambda matrices: True)
    weight = torch.nn.Parameter(random(16, 16))
    optimizer = Shampoo4([("weight", weight)], statistics_interval=1, max_failures=1)
    for number in range(3):
        weight.grad = 1e-24 * random(16, 16, seed=number)
        weight.grad[3] = 0
        weight.grad[:, 7] = 0
        optimizer.step()
    assert weight.isfinite().all()


def test_what_is_not_orthogonal_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.stack([torch.zeros(32, 32), torch.full((32, 32), torch.nan), random(32, 32)])
    assert linalg.cholesky_qr(matrices, torch.eye(32)).isnan().flatten(1).all(1).tolist() == [False, True, False]
    monkeypatch.setattr(linalg, "_ROUNDS", 0)
    low_rank = random(1, 32, 3) @ random(1, 3, 32, seed=1)
    monkeypatch.setattr(linalg, "_SHIFTED_ROUNDS", 1)
    assert linalg.cholesky_qr(low_rank, torch.eye(32)).isnan().all()


@pytest.mark.parametrize("options", [{}, {"preset": "compact"}, {"bits": 32}], ids=str)
def test_directions_are_those_of_qr(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of eigenvectors do not matter: moments turn with them. Codes may round otherwise, and in the null spaces of
    the first statistics both are rounding, which the first directions contain."""
    shapes = [(96, 80), (130, 64)]

    def directions() -> Directions:
        return Directions(shapes, method="soap", **options, statistics_interval=2)

    first, second, cosines = directions(), directions(), []
    for gradients in replayed(shapes, 12):
        expected = first.step(gradients)
        with monkeypatch.context() as patch:
            patch.setattr(linalg, "_suits_cholesky", lambda _: True)
            found = second.step(gradients)
        for one, other in zip(found, expected, strict=True):
            assert one is not None and other is not None
            cosines.append(float(cosine_similarity(one.flatten(), other.flatten(), dim=0)))
    assert min(cosines[8:]) > (0.95 if options.get("preset") else 0.985), cosines
    assert min(cosines) > 0.4, cosines
