"""Every rule and every form of storage trains a small vision transformer on the GPU."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from support import worlds
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4

pytestmark = pytest.mark.gpu

CHOICES: dict[str, dict[str, Any]] = {
    "shampoo": {},
    "paper": Shampoo4.paper_settings(),
    "shampoo, compact": {"preset": "shampoo-compact"},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "32 bits": {"bits": 32},
    "small factors in float32": {"min_quant_numel": 1600},
    "naive": {"quantize": "preconditioner"},
    "naive, 3 bits": {"quantize": "preconditioner", "bits": 3},
    "dynamic tree": {"codebook": "dynamic_tree"},
    "normal code book": {"codebook": "normal"},
    "blocks of 48": {"quant_block_size": 48},
    "bfloat16 scales": {"scale_dtype": "bfloat16"},
    "implicit roots": {"root": "implicit"},
    "remainder split": {"split": "remainder"},
    "staggered": {"refresh": "staggered"},
    "staggered, compact": {"refresh": "staggered", "preset": "shampoo-compact"},
    "two QR steps": {"refresh_iterations": 2},
    "refresh in float32": {"refresh_dtype": "float32"},
    "block grafting": {"grafting": "block"},
    "no grafting": {"grafting": "none"},
    "products in bfloat16": {"matmul_dtype": "bfloat16"},
    "compact, products in bfloat16": {"matmul_dtype": "bfloat16", "preset": "shampoo-compact"},
    "exchange in bfloat16": {"exchange_dtype": "bfloat16"},
    "fused": {"fused": True},
    "SGD": {"base": "sgd", "momentum": 0.9, "lr": 1e-2},
    "Adagrad": {"base": "adagrad"},
    "soap": {"method": "soap"},
    "soap, compact": {"preset": "compact"},
    "soap, 32 bits": {"method": "soap", "bits": 32},
    "soap, Newton-Schulz": {"method": "soap", "newton_schulz_steps": 5},
    "soap, staggered": {"method": "soap", "refresh": "staggered"},
}
# Options beside those of CHOICES, which are of method="shampoo" unless they say otherwise.
SHAMPOO = {"method": "shampoo", "statistics_interval": 2, "root_interval": 4}
SOAP = {"statistics_interval": 2, "interval_warmup": False}
STEPS = 9


class Run:
    """A model, its optimizer, and a batch that it learns by heart."""

    def __init__(self, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
        self.model = worlds.make_model("vit").to(device, dtype)
        rule = SOAP if options.get("method") == "soap" or options.get("preset") == "compact" else SHAMPOO
        options = {"lr": 3e-3, "max_preconditioner_dim": 60, "min_quant_numel": 0, **rule, **options}
        self.optimizer = Shampoo4(self.model.named_parameters(), **options)
        inputs, targets = worlds.make_batch("vit")
        self.batch = inputs.to(device, dtype), targets.to(device)

    def step(self, gradients: dict[str, Tensor] | None = None) -> float:
        """Train, or replay ``gradients``."""
        self.optimizer.zero_grad()
        loss = worlds.train_step(self.model, self.batch) if gradients is None else math.nan
        for name, gradient in (gradients or {}).items():
            self.parameters[name].grad = gradient.clone()
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        self.optimizer.step()
        return loss

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def check(device: torch.device, dtype: torch.dtype, **options: Any) -> None:
    """Train, go on from a saved state, and compare."""
    run = Run(device, dtype, **options)
    losses = []
    for _ in range(STEPS):
        losses.append(run.step())
        directions = [parameter.grad for parameter in run.parameters.values() if parameter.grad is not None]
        assert all(bool(direction.isfinite().all()) for direction in directions)
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.95 * losses[0], losses
    check_places(run.optimizer, device)
    assert not any(worst["failures"] for worst in run.optimizer.health().values())

    resumed = Run(device, dtype, **options)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(saved(run.optimizer))
    for _ in range(2):  # an update of the statistics among them
        run.step()
        resumed.step(run.gradients)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, parameter in run.copy().items():
        torch.testing.assert_close(resumed.copy()[name], parameter, rtol=tolerance, atol=tolerance)
    assert resumed.optimizer.state_bytes() == run.optimizer.state_bytes()


def check_places(optimizer: Shampoo4, device: torch.device) -> None:
    """The states are where the parameters are; torch's own counts of steps may be on the host."""
    states = optimizer.state_dict()["state"].values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim > 0]
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert sum("preconditioner" in state for state in states) == 8, "the matrices that are trained"


def saved(optimizer: Shampoo4) -> dict[str, Any]:
    """Its state, as a file gives it back on a machine without this device."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_training(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(device, dtype, **CHOICES[name])
