"""The examples in docstrings of launch scripts; pytest finds those of the package itself."""

from __future__ import annotations

import doctest
import importlib

import pytest
from support import launching  # noqa: F401  finds launch/


@pytest.mark.parametrize("name", ["plots", "vit.report", "bench.growth", "bench.blocks"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
