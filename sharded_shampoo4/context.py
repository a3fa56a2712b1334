"""Keeps the caller's settings out of the optimizer's arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_REDUCED = ("tf32", "bf16")  # in which PyTorch may multiply float32 matrices where the caller allows it


@contextlib.contextmanager
def own_arithmetic() -> Iterator[None]:
    """Compute in the precision that the optimizer's options state, whatever surrounds the call.

    Inside, autocast, inference mode and autograd are off, and float32 matrices are multiplied in IEEE float32: neither
    ``torch.set_float32_matmul_precision`` nor ``allow_tf32`` has an effect. The caller's settings come back at the end.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in _device_types():
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_ieee_products())
        yield


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32 in here, inside :func:`own_arithmetic`."""
    library = torch.backends.cuda.matmul
    former = library.fp32_precision
    library.fp32_precision = "tf32"
    try:
        yield
    finally:
        library.fp32_precision = former


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    # torch 2.9 and later keep a setting for each library, and refuse to read the older one beside it.
    libraries = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if not all(hasattr(library, "fp32_precision") for library in libraries):
        former = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(former)
        return
    kept = [(library, library.fp32_precision) for library in libraries if library.fp32_precision in _REDUCED]
    for library, _ in kept:
        library.fp32_precision = "ieee"
    try:
        yield
    finally:
        for library, precision in kept:
            library.fp32_precision = precision
