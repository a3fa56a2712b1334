"""SOAP and Shampoo for PyTorch with eigenbases in 8 or 4 bits."""

import importlib
from typing import Any

from .memory import MemoryEstimate, estimate_memory
from .optimizer import Shampoo4

__all__ = ["MemoryEstimate", "Shampoo4", "checkpoint", "estimate_memory"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "checkpoint":  # its imports take a while
        return importlib.import_module(".checkpoint", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
