"""Fixtures of the tests of launch scripts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate's state, for this process alone, taken back afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    PartialState()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
