"""The library against the slow reference, on replayed gradients."""

from __future__ import annotations

import pytest
import torch
from reference import Reference
from torch import Tensor

from sharded_shampoo4 import Shampoo4, quantization
from sharded_shampoo4.factors import FactorPool

# Orders 48, 64, 65, 96, 130 and 200, and blocks of 100, 65 and 48 where max_preconditioner_dim=100 cuts.
SHAPES = [(64, 64), (65, 48), (130, 96), (200, 65), (48, 3, 5, 2), (64, 1, 64), (96, 200), (7,)]
STEPS = 48


def replayed(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Gradients with a drifting low-rank part, as training has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors = [(normal(s[0], 3), normal(3, torch.Size(s[1:]).numel())) for s in shapes]
    gradients = []
    for _ in range(steps):
        factors = [(a + 0.3 * normal(*a.shape), b + 0.3 * normal(*b.shape)) for a, b in factors]
        gradients.append([(a @ b).view(s) + 0.5 * normal(*s) for (a, b), s in zip(factors, shapes, strict=True)])
    return gradients


class Directions:
    """Shampoo4 around plain gradient descent, asked for its directions."""

    def __init__(self, shapes: list[tuple[int, ...]], **options: object) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.optimizer = Shampoo4(self.parameters, lr=0.0, base="sgd", **options)

    def step(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()
        return [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]

    def factor(self, index: int, row: int, column: int, side: str) -> tuple[FactorPool, int]:
        preconditioner = self.optimizer._bindings.last.preconditioner
        matrices = [i for i, p in enumerate(self.parameters) if p.squeeze().ndim > 1]
        for (matrix, block), places in preconditioner._places.items():
            if (matrices[matrix], block.row, block.column) == (index, row, column):
                return places["LR".index(side)]
        raise KeyError


OPTIONS = {
    "eigenbasis": {},
    "whole matrices": {"max_preconditioner_dim": 1024},
    "remainder split": {"split": "remainder"},
    "dynamic tree, 3 bits": {"codebook": "dynamic_tree", "bits": 3},
    "8 bits, blocks of 48": {"bits": 8, "quant_block_size": 48},
    "naive": {"quantize": "preconditioner"},
    "32 bits": {"bits": 32},
    "everything quantised": {"min_quant_numel": 0},
    "block grafting": {"grafting": "block"},
    "no grafting, other constants": {
        "grafting": "none", "shampoo_beta": 0.8, "matrix_eps": 1e-4, "rectify_steps": (0, 2)
    },
    "triangles": {"root": "triangle"},
    "triangles, everything quantised": {"root": "triangle", "min_quant_numel": 0, "bits": 8},
    "implicit roots": {"root": "implicit"},
    "normal code book, bfloat16 scales": {"codebook": "normal", "scale_dtype": "bfloat16"},
    "linear square, bfloat16 scales": {"scale_dtype": "bfloat16"},
    "two QR steps": {"refresh_iterations": 2},
    "staggered": {"refresh": "staggered"},
    "compact": Shampoo4.compact_settings(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_directions_and_codes(name: str) -> None:
    options = {"statistics_interval": 2, "root_interval": 4, "max_preconditioner_dim": 100, **OPTIONS[name]}
    fast = Directions(SHAPES, **options)
    staggered = options.pop("refresh", "together") == "staggered"
    if options.get("codebook") == "normal":  # test_quantization.py has the levels
        options["codebook"] = quantization.normal(options.get("bits", 4), 64)
    slow = Reference(SHAPES, **options, phases=phases(fast) if staggered else None)
    differences = []
    # Where a value falls between two levels but for its last digit, a code may differ, and what follows from it does.
    flipped: set[object] = set()
    for gradients in replayed(SHAPES, STEPS if name == "eigenbasis" else STEPS // 2):
        for ours, theirs in zip(fast.step(gradients), slow.step(gradients), strict=True):
            differences.append(((ours - theirs).norm() / theirs.norm()).item())
        for key in slow.factors.keys() - flipped:
            equal, total = compare_codes(fast, slow, key)
            assert equal >= 0.999 * total, (key, equal, total)
            flipped |= {key} if equal < total else set()
    assert len(flipped) <= 0.1 * len(slow.factors), flipped
    assert torch.tensor(differences).median() < (1e-4 if options.get("bits") == 32 else 1e-5), sorted(differences)[-5:]
    print(name, sorted(differences)[len(differences) // 2], max(differences))
    assert any(stored_codes(factor) for factor in slow.factors.values()) == (options.get("bits") != 32)


def compare_codes(fast: Directions, slow: Reference, key: tuple[int, int, int, str]) -> tuple[int, int]:
    """How many of a factor's stored codes are equal, and how many there are."""
    pool, index = fast.factor(*key)
    equal = total = 0
    for stored, expected in stored_codes(slow.factors[key]).items():
        codes = quantization.unpack(pool.tensors[f"{stored}.codes"][index], pool.options.bits, expected.shape[1])
        equal += (codes == expected).sum().item()
        total += codes.numel()
    return equal, total


def stored_codes(factor: object) -> dict[str, Tensor]:
    if factor.kind == "plain":
        return {}
    if factor.kind == "preconditioner":
        return {"statistics": factor.off.codes, "root": factor.root_off.codes}
    return {"basis": factor.codes} if factor.implicit else {"basis": factor.codes, "root": factor.root_off.codes}


def phases(fast: Directions) -> dict[tuple[int, int, int, str], tuple[int, int]]:
    """When the factors are due, as the reference takes it."""
    optimizer = fast.optimizer
    schedule = optimizer._members.schedule({})
    assert schedule, "all groups are staggered"
    return {
        (int(name.split()[1]), block.row, block.column, side): tuple(phase)
        for (_, name), blocks in schedule.items()
        for block, both in blocks.items()
        for side, phase in zip("LR", both, strict=True)
    }
