"""Labels that show the parts of a step in a profile."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.profiler import record_function

# record_function takes some 10 us even while nothing is profiled, and this 0.3 us; torch has it since 2.2.
_Label: Any = getattr(getattr(torch._C, "_profiler", None), "_RecordFunctionFast", record_function)


def label(part: str) -> contextlib.AbstractContextManager[Any]:
    """Show what runs inside as ``shampoo4::<part>`` to torch.profiler; costs next to nothing without one.

    The parts are ``gather``, ``statistics`` (with the roots of new eigenbases), ``roots`` (the others),
    ``precondition``, ``graft``, ``send_back`` and ``base``.
    """
    made: contextlib.AbstractContextManager[Any] = _Label(f"shampoo4::{part}")
    return made
