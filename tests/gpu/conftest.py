"""Tests on a GPU; skipped where there is none.

Set ``SHAMPOO4_GPU_TESTS_DEVICE=cpu`` to try the tests themselves on a CPU. Tests about CUDA stay skipped.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Where to train."""
    chosen = torch.device(os.environ.get("SHAMPOO4_GPU_TESTS_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: run `make test-gpu` on a machine that has one")
    return chosen


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The same, for tests that nothing but CUDA can pass."""
    if device.type != "cuda":
        pytest.skip(f"this is about CUDA, and the tests run on the {device.type} (SHAMPOO4_GPU_TESTS_DEVICE)")
    return device


@pytest.fixture(autouse=True)
def products_in_float32() -> None:
    """TF32 has 10 bits. PyTorch does not use it unless it is told to."""
    torch.set_float32_matmul_precision("highest")
