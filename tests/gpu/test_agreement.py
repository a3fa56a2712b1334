"""The GPU computes the directions that the CPU computes, on replayed gradients.

Statistics and roots are computed in float64, unless a test says otherwise: the two then differ by the rounding of
float32 products, about 2e-6 of a direction. Where a value lies between two codes, that rounding may choose the other
one, and this factor's directions differ by more from there on: so low bits are compared by medians and by angles. In
float32 the rounding of statistics chooses other codes everywhere; then only the angles say something.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.directions import Directions, replayed
from torch import Tensor
from torch.nn.functional import cosine_similarity

pytestmark = pytest.mark.gpu

SHAPES = [(64, 64), (130, 96), (300, 520), (48, 3, 5, 2), (7,)]
ROOT_INTERVAL, STEPS = 4, 16
SETTINGS: dict[str, Any] = {"statistics_interval": 2, "root_interval": ROOT_INTERVAL, "refresh_dtype": "float64"}
COMPACT = {"preset": "shampoo-compact"}


class Tolerance(NamedTuple):
    """Of directions after the first roots: differences relative to a direction's norm, and the least cosine."""

    median: float
    largest: float
    cosine: float


# Some times what noise as large as rounding, in products and factorizations, does on a CPU. Products in TF32 would be
# beyond the first three.
EXACT = Tolerance(2e-5, 1e-4, 0.9999)
CODES = Tolerance(1e-4, 1.0, 0.8)
ROUNDED_GRADIENTS = Tolerance(1e-3, 2e-2, 0.999)
BFLOAT16 = Tolerance(2e-2, 1.0, 0.8)
CHAOTIC = Tolerance(0.5, 1.0, 0.8)

# Of method="soap": where coordinates have next to no gradients, rounding decides their directions. About five times
# what noise of 1e-6 in the gradients does on a CPU.
SOAP_CASES: dict[str, tuple[dict[str, Any], Tolerance]] = {
    "soap, 32 bits": ({"bits": 32}, Tolerance(5e-3, 0.3, 0.98)),
    "soap": ({}, Tolerance(0.3, 1.5, 0.5)),
    "soap, compact": ({"preset": "compact"}, Tolerance(0.6, 1.5, 0.5)),
}

CASES: dict[str, tuple[dict[str, Any], Tolerance]] = {
    "32 bits": ({"bits": 32}, EXACT),
    "32 bits, block grafting": ({"bits": 32, "grafting": "block"}, EXACT),
    "32 bits, blocks": ({"bits": 32, "max_preconditioner_dim": 100}, EXACT),
    "32 bits, refresh in float32": ({"bits": 32, "refresh_dtype": "float32"}, Tolerance(1e-3, 5e-2, 0.995)),
    "default": ({}, CODES),
    "3 bits": ({"bits": 3}, CODES),
    "8 bits": ({"bits": 8}, CODES),
    "naive": ({"quantize": "preconditioner"}, CODES),
    "implicit roots": ({"root": "implicit"}, CODES),
    "compact": (COMPACT, CODES),
    "staggered": ({"refresh": "staggered"}, CODES),
    "products in bfloat16": ({"matmul_dtype": "bfloat16"}, BFLOAT16),
    "exchange in bfloat16": ({"bits": 32, "exchange_dtype": "bfloat16"}, ROUNDED_GRADIENTS),
    "refresh in float32": ({"refresh_dtype": "float32"}, CHAOTIC),
    "compact, refresh in float32": ({**COMPACT, "refresh_dtype": "float32"}, CHAOTIC),
}


def compare(ours: Directions, theirs: Directions, first: int = ROOT_INTERVAL) -> Tolerance:
    """How different their directions are from the ``first`` step with one on; before, they are the gradients."""
    differences, cosines = [], []
    for step, gradients in enumerate(replayed(SHAPES, STEPS), 1):
        for found, expected in zip(ours.step(gradients), theirs.step(gradients), strict=True):
            assert found is not None and expected is not None
            if step < first or expected.ndim == 1:
                assert torch.equal(found, expected)
                continue
            differences.append(float((found - expected).norm() / expected.norm()))
            cosines.append(float(cosine_similarity(found.flatten(), expected.flatten(), dim=0)))
    return Tolerance(float(torch.tensor(differences).median()), max(differences), min(cosines))


def check(found: Tolerance, allowed: Tolerance) -> None:
    print(found)
    assert found.median <= allowed.median and found.largest <= allowed.largest and found.cosine >= allowed.cosine, found


@pytest.mark.parametrize("name", CASES)
def test_directions_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    options, allowed = CASES[name]
    there, here = (Directions(SHAPES, device=where, **{**SETTINGS, **options}) for where in (device.type, "cpu"))
    check(compare(there, here), allowed)


@pytest.mark.parametrize("name", SOAP_CASES)
def test_directions_of_soap_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    options, allowed = SOAP_CASES[name]
    options = {"statistics_interval": 2, "refresh_dtype": "float64", "method": "soap", **options}
    there, here = (Directions(SHAPES, device=where, **options) for where in (device.type, "cpu"))
    check(compare(there, here, first=1), allowed)


def test_products_in_tf32_are_nearly_those_of_float32(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda) < (8, 0):
        pytest.skip("no TF32 before compute capability 8.0")
    settings = {**SETTINGS, "bits": 32}
    ours = Directions(SHAPES, device="cuda", **settings, matmul_dtype="tf32")
    found = compare(ours, Directions(SHAPES, device="cuda", **settings))
    check(found, Tolerance(1e-2, 5e-2, 0.999))
    assert found.median > 1e-5, "as exact as float32"


@pytest.mark.parametrize("options", [{}, COMPACT], ids=["default", "compact"])
def test_equal_steps_are_equal(options: dict[str, Any], device: torch.device) -> None:
    """Two runs on one device agree. Only the order in which norms are added up may differ."""
    first, second = (Directions(SHAPES, device=device.type, **{**SETTINGS, **options}) for _ in range(2))
    check(compare(first, second), Tolerance(1e-6, 1e-6, 0.99999))


def test_a_state_of_the_gpu_goes_on_on_the_cpu(device: torch.device) -> None:
    there, here = Directions(SHAPES, device=device.type, **SETTINGS), Directions(SHAPES, **SETTINGS)
    gradients = replayed(SHAPES, STEPS)
    for step in gradients[: STEPS - 1]:
        there.step(step)
    here.optimizer.load_state_dict(on_the_cpu(there.optimizer.state_dict()))
    for found, expected in zip(here.step(gradients[-1]), there.step(gradients[-1]), strict=True):
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def on_the_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_the_cpu(part) for key, part in value.items()}
    return [on_the_cpu(part) for part in value] if isinstance(value, list) else value
