"""method="soap" in one process: directions against the slow reference, and what is left to the base."""

from __future__ import annotations

import pytest
import torch
from support.directions import Directions, replayed
from support.soap_reference import SoapReference
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.numerics import quantization

SHAPES = [(64, 64), (65, 48), (130, 96), (48, 3, 5, 2), (96, 200), (7,), (900, 5), (70, 600)]
OPTIONS = {
    "32 bits": {"bits": 32},
    "8 bits": {},
    "4 bits": {"bits": 4},
    "4 bits, not protected": {"bits": 4, "protect": False},
    "normal, bfloat16 scales": {"bits": 4, "codebook": "normal", "scale_dtype": "bfloat16"},
    "everything quantized, rectified": {"bits": 8, "min_quant_numel": 0, "rectify_steps": (1, 2)},
    "other constants": {"bits": 32, "soap_betas": (0.8, 0.99), "soap_eps": 1e-3, "shampoo_beta": 0.5},
    "no momentum": {"bits": 32, "soap_betas": (0.0, 0.95)},
    "Newton-Schulz": {"bits": 32, "newton_schulz_steps": 5},
    "bfloat16 moments": {"momentum_dtype": "bfloat16", "second_moment_dtype": "bfloat16"},
    "factored": {"bits": 32, "second_moment_dtype": "factored"},
    "8-bit moments": {"momentum_dtype": "int8", "second_moment_dtype": "int8"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_directions(name: str) -> None:
    """Equal up to rounding. Where a stored value is within rounding of the boundary of two levels, it may differ."""
    moments = {} if "moments" in name else {"momentum_dtype": "float32", "second_moment_dtype": "float32"}
    exact = {"refresh_dtype": "float64", "scale_dtype": "float32"}
    options = {"statistics_interval": 3, "max_preconditioner_dim": 100, **exact, **moments, **OPTIONS[name]}
    fast = Directions(SHAPES, method="soap", interval_warmup=False, **options)
    if options.get("codebook") == "normal":
        options["codebook"] = quantization.normal(options["bits"], 64)
    if options.get("bits") == 4:
        options = {"rectify_steps": (1, 1), "protect": True, **options}
    slow = SoapReference(SHAPES, **options)
    differences = []
    for gradients in replayed(SHAPES, 14):
        for ours, theirs in zip(fast.step(gradients), slow.step(gradients), strict=True):
            differences.append(((ours - theirs).norm() / theirs.norm()).item())
    rounded = "moments" in name
    assert sorted(differences)[len(differences) * 3 // 4] < (2e-3 if rounded else 2e-5), sorted(differences)[-12:]
    assert max(differences) < 5e-2, sorted(differences)[-8:]


def test_a_basis_that_is_new_makes_no_large_direction() -> None:
    """Gradients of a small batch have low rank: nothing may be divided by a second moment of other coordinates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 70), nn.Linear(70, 3))
    optimizer = Shampoo4(model.named_parameters(), method="soap", lr=1e-3, statistics_interval=2)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 20, generator=generator)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :3].sin()).square().mean().backward()
        optimizer.step()
        sizes = [p.grad.square().mean().sqrt().item() for p in model.parameters() if p.ndim == 2]
        assert max(sizes) < 1.5, (step, sizes)


def test_blocks_of_one_row_have_no_protected_eigenvectors() -> None:
    weight = nn.Parameter(torch.randn(8, 257))
    optimizer = Shampoo4([weight], preset="compact", min_quant_numel=0, split="remainder", max_aspect=0)
    for _ in range(2):
        weight.grad = torch.randn(8, 257)
        optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("decay, kind", [(0.99, "int8"), (0.995, "bfloat16"), (0.999, "float32"), (0.999, "factored")])
def test_second_moments_follow_gradients_that_become_small(decay: float, kind: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = Shampoo4([weight], lr=1.0, weight_decay=0.0, soap_betas=(0.9, decay), second_moment_dtype=kind)
    for step in range(round(12 / (1 - decay)) + 50):
        weight.grad = torch.randn(16, 16) * (1 if step < 50 else 0.01)
        before = weight.detach().clone()
        optimizer.step()
    assert 0.2 < (weight - before).square().mean().sqrt() < 0.33  # as with gradients that stay as large


@pytest.mark.parametrize("index, kind, decay", [(1, "bfloat16", 0.999), (1, "int8", 0.995), (0, "int8", 0.995)])
def test_moments_that_would_stand_still_are_refused(index: int, kind: str, decay: float) -> None:
    name, betas = ("momentum_dtype", "second_moment_dtype")[index], [0.9, 0.9]
    betas[index] = decay
    with pytest.raises(ValueError, match=f"than {name}='{kind}' can hold"):
        Shampoo4([nn.Parameter(torch.zeros(8, 8))], soap_betas=tuple(betas), **{name: kind})
