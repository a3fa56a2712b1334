"""Scripts that say nothing before they begin, whatever transformers imports."""

from __future__ import annotations

import sys

import pytest
from support.launching import LAUNCH, run_really
from support.marks import needs, slow_except


@needs("torchao")
@pytest.mark.parametrize("script", slow_except(["train_vit"], ["train_vit", "compare"]))
def test_a_script_keeps_torchaos_warnings_to_itself(script: str) -> None:
    """Of kernels for other machines, and of torchao's calls of torch. A fresh process, since torchao warns once."""
    found = run_really(sys.executable, LAUNCH / f"{script}.py", "--help")
    assert found.returncode == 0 and found.stderr == ""
