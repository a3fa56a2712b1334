"""What the quick tier leaves out."""

from __future__ import annotations

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
