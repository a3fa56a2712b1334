"""Products and exchange in bfloat16: what they do to directions, beside what four bits do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.directions import Directions
from torch import Tensor

SHAPES = [(96, 64), (64, 130), (128, 128)]
ROOT_INTERVAL, STEPS = 4, 16
OPTIONS = {"statistics_interval": 2, "root_interval": ROOT_INTERVAL, "min_quant_numel": 0}


def gradients(smallest: float) -> list[list[Tensor]]:
    """Sums of directions that persist, the last of them ``smallest`` times the first, and noise."""
    torch.manual_seed(0)
    sides = [(torch.randn(m, min(m, n)), torch.randn(min(m, n), n)) for m, n in SHAPES]
    sizes = [torch.logspace(0, math.log10(smallest), left.shape[1]) for left, _ in sides]
    return [
        [
            (left * size * torch.randn(len(size))) @ right + 1e-3 * torch.randn(len(left), right.shape[1])
            for (left, right), size in zip(sides, sizes, strict=True)
        ]
        for _ in range(STEPS)
    ]


def largest_error(smallest: float, options: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Of a direction, relative to its norm, after the first root."""
    ours, exact = Directions(SHAPES, **{**OPTIONS, **options}), Directions(SHAPES, **{**OPTIONS, **reference})
    errors = []
    for step, replayed in enumerate(gradients(smallest), 1):
        for found, expected in zip(ours.step(replayed), exact.step(replayed), strict=True):
            if step >= ROOT_INTERVAL:
                errors.append(float((found - expected).norm() / expected.norm()))
    return max(errors)


@pytest.mark.parametrize("smallest", [1.0, 1e-3])
@pytest.mark.parametrize("layout", ["stored", "compact"])
def test_products_in_bfloat16_change_directions_much_less_than_four_bits_do(layout: str, smallest: float) -> None:
    """The states are the same. The error is rounding, 0.4 %, times how differently roots scale directions."""
    settings = {"preset": "shampoo-compact"} if layout == "compact" else {}
    error = largest_error(smallest, {**settings, "matmul_dtype": "bfloat16"}, settings)
    of_four_bits = largest_error(smallest, settings, {"bits": 32})
    print(f"{layout}, {smallest}: products {error:.3f}, 4 bits {of_four_bits:.3f}")
    assert 1e-3 < error < (0.15 if smallest < 1 else 0.06) < of_four_bits / 4


@pytest.mark.parametrize("smallest", [1.0, 1e-3])
def test_an_exchange_in_bfloat16_changes_directions_less_than_four_bits_do(smallest: float) -> None:
    """In 32 bits, since the statistics are of rounded gradients, and the least change turns 4-bit codes over."""
    error = largest_error(smallest, {"bits": 32, "exchange_dtype": "bfloat16"}, {"bits": 32})
    print(f"exchange, {smallest}: {error:.3f}")
    assert 1e-3 < error < (0.3 if smallest < 1 else 0.1)


@pytest.mark.parametrize("bits", [3, 4])
def test_protected_bases_are_nearer_to_32_bits(bits: int) -> None:
    settings = {"bits": bits, "root": "implicit"}
    plain, protected = (
        largest_error(1e-4, {**settings, "protect": protect}, {"bits": 32}) for protect in (False, True)
    )
    print(f"{bits} bits: {plain:.3f}, protected {protected:.3f}")
    assert protected < 0.9 * plain
