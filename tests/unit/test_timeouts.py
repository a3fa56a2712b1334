"""A test that hangs fails, and the report names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SETTINGS = Path(__file__).parents[2] / "setup.cfg"

HANGS = """
import signal, time

def test_waits():
    time.sleep(60)

def test_goes_on():
    pass

def test_waits_where_python_cannot_interrupt_it():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)
"""


def test_a_test_that_hangs_fails_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    limits = ("-o", "timeout=1", "-o", "faulthandler_timeout=3")
    command = [sys.executable, "-m", "pytest", "-c", str(SETTINGS), "--rootdir", str(tmp_path), *limits, str(tmp_path)]
    done = subprocess.run(
        [*command, "-v", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.returncode != 0
    assert "test_hangs.py::test_waits FAILED" in done.stdout
    assert "test_hangs.py::test_goes_on PASSED" in done.stdout
    assert "Timeout (0:00:03)!" in done.stderr and "in test_waits_where_python_cannot_interrupt_it" in done.stderr
