"""What the quick tier leaves out, and what needs packages that may be missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_except(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Mark as slow each of ``values``, for parametrize, that is not among the ``quick`` ones."""
    return [value if value in quick else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def batch_of(value: str, quick: tuple[str, ...], values: Iterable[str]) -> tuple[str, ...]:
    """Those of ``values`` that run in one launch with ``value``: all ``quick`` ones, or all others."""
    return quick if value in quick else tuple(other for other in values if other not in quick)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip a test where one of ``packages`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")
