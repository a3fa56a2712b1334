"""The deliberate faults of tests/faults.py."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_has_its_place_in_the_code(name: str) -> None:
    fault, package = faults.FAULTS[name], Path(faults.ROOT) / "sharded_shampoo4"
    assert fault.broken(package) != (package / fault.path).read_text()
