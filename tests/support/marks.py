"""What the quick tier leaves out, and what a machine must have."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable
from typing import Any

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def slow_but_for(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Mark as slow each of ``values``, for parametrize, that is not among the ``quick`` ones."""
    return [value if value in quick else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def batch_of(value: str, quick: tuple[str, ...], values: Iterable[str]) -> tuple[str, ...]:
    """Those of ``values`` that run in one launch with ``value``: all ``quick`` ones, or all others."""
    return quick if value in quick else tuple(other for other in values if other not in quick)
