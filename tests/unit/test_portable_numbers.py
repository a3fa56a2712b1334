"""Numbers in portable checkpoints: learning rates that are tensors, counts of steps, and what a load must forget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint, options
from sharded_shampoo4.checkpoint.files import read_manifest


class Scaled(nn.Module):
    """Two matrices and a scalar."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 8, dtype=dtype))
        self.second = nn.Parameter(torch.randn(8, 8, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))


def step(model: nn.Module, optimizer: Shampoo4) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Scaled, Shampoo4]:
    model = Scaled(dtype)
    optimizer = Shampoo4(model.named_parameters(), **options)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def moved(model: nn.Module, optimizer: Shampoo4, folder: Path, dtype: torch.dtype, **options: Any) -> Shampoo4:
    """Save, and load into another optimizer."""
    checkpoint.save(optimizer, folder, model=model)
    other_model, other = trained(0, dtype, **options)
    checkpoint.load(other, folder, model=other_model)
    step(other_model, other)
    return other


@pytest.mark.parametrize("rate", [torch.tensor(0.125), np.float32(0.125)], ids=["tensor", "numpy"])
def test_a_learning_rate_of_another_type(rate: Any, tmp_path: Path) -> None:
    model, optimizer = trained(1, lr=torch.tensor(1.0))
    optimizer.param_groups[0]["lr"] = rate
    other = moved(model, optimizer, tmp_path, torch.float32, lr=torch.tensor(1.0))
    lr = other.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr == 0.125


@pytest.mark.parametrize("base", ["adamw", torch.optim.NAdam], ids=str)
def test_numbers_of_a_scalar_parameter_are_numbers(base: Any, tmp_path: Path) -> None:
    model, optimizer = trained(base=base)
    checkpoint.save(optimizer, tmp_path, model=model)
    kept = read_manifest(tmp_path)["parameters"]["scale"]["base"]
    assert kept["step"] == {"value": 3.0, "tensor": True}
    assert {name for name, described in kept.items() if "dtype" in described} == {"exp_avg", "exp_avg_sq"}


def test_steps_of_a_scalar_parameter_in_low_precision(tmp_path: Path) -> None:
    model, optimizer = trained(300, torch.bfloat16, fused=True)
    other = moved(model, optimizer, tmp_path, torch.bfloat16, fused=True)
    count = other.state[other.param_groups[0]["params"][2]]["step"]
    assert count.dtype == torch.float32 and count == 301


def test_a_load_forgets_the_factors_of_frozen_parameters(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoint.save(optimizer, tmp_path, model=model)
    for _ in range(5):
        step(model, optimizer)
    model.second.requires_grad_(False)
    step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of states that are dropped
        checkpoint.load(optimizer, tmp_path, model=model)
    model.second.requires_grad_(True)
    step(model, optimizer)
    assert {name: values["steps"] for name, values in optimizer.health().items()} == {"first": 2, "second": 1}


def test_a_load_keeps_states_of_what_is_not_preconditioned(tmp_path: Path) -> None:
    """Its former factors were set aside when the group was changed."""
    model, optimizer = trained(1)
    optimizer.param_groups[0]["precondition"] = False
    step(model, optimizer)
    checkpoint.save(optimizer, tmp_path, model=model)
    step(model, optimizer)
    checkpoint.load(optimizer, tmp_path, model=model)
    assert optimizer.state[model.first]["step"] == 1 and optimizer.state[model.scale]["step"] == 2


def test_a_load_forgets_the_states_of_frozen_vectors(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoint.save(optimizer, tmp_path, model=model)
    step(model, optimizer)
    model.scale.requires_grad_(False)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of states that are dropped
        checkpoint.load(optimizer, tmp_path, model=model)
    assert not optimizer.state.get(model.scale)


def test_betas_that_are_refused_by_now_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # an earlier version
        patch.setattr(options, "SMALLEST_CHANGE", {})
        options._cached.cache_clear()
        model, optimizer = trained(1, soap_betas=(0.9, 0.999), lr=0.5)
        checkpoint.save(optimizer, tmp_path, model=model)
    options._cached.cache_clear()
    model, optimizer = trained(0)
    with pytest.warns(UserWarning, match=r"keeps soap_betas=\(0.9, 0.95\): .* it would stand still"):
        checkpoint.load(optimizer, tmp_path, model=model)
    step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
