"""Forked workers (support/forked.py) are what launchers start: the same environment and arguments, the same ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import configurations, forked
from support.launching import LAUNCH, SCRIPTS, accelerate, run_really
from support.marks import slow_except

SCRIPT = SCRIPTS / "environment_script.py"
LAUNCHERS = {
    "fsdp2": accelerate("fsdp2", 2),
    "zero3": accelerate("zero3", 2),
    "torchrun": configurations.LAUNCHERS["torchrun"],
}
OWN = {  # a launch's own, and those of the agent that forked workers do without
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
    "TORCHELASTIC_SIGNALS_TO_HANDLE",  # which the agent takes from its caller; torch 2.9.0 does not pass it on
}


def told(run: Callable[..., Any], folder: Path, launcher: tuple[object, ...]) -> list[dict[str, Any]]:
    """What each of two workers says of itself."""
    folder.mkdir()
    process = run(*launcher, SCRIPT, folder)
    assert process.returncode == 0, process.stderr[-2000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for worker in found:
        assert worker["arguments"].pop() == str(folder)
    return found


@pytest.mark.parametrize("name", slow_except(["fsdp2"], LAUNCHERS))
def test_a_forked_worker_has_the_environment_of_a_launched_one(name: str, tmp_path: Path) -> None:
    really = told(run_really, tmp_path / "really", LAUNCHERS[name])
    forked_ones = told(forked.run, tmp_path / "forked", LAUNCHERS[name])
    for real, copy in zip(really, forked_ones, strict=True):
        assert copy["arguments"] == real["arguments"]
        pair = copy["environment"], real["environment"]
        variables = (pair[0].keys() | pair[1].keys()) - OWN
        values = {variable: tuple(environment.get(variable) for environment in pair) for variable in variables}
        assert {variable: both for variable, both in values.items() if both[0] != both[1]} == {}
        assert ("ACCELERATE_USE_FSDP" in copy["environment"]) is (name == "fsdp2")


def test_a_worker_that_fails_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    process = forked.run(*LAUNCHERS["torchrun"], SCRIPT, tmp_path, 3)
    assert process.returncode == 1 and time.monotonic() - begun < 60
    process = forked.run(sys.executable, LAUNCH / "train_vit.py", "--no_such_flag")
    assert process.returncode == 2 and "--no_such_flag" in process.stderr
