"""4-bit Shampoo for PyTorch."""

from .memory import MemoryEstimate, estimate_memory
from .optimizer import Shampoo4

__all__ = ["MemoryEstimate", "Shampoo4", "estimate_memory"]
__version__ = "0.1.0"
