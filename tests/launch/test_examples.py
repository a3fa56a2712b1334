"""The scripts of launch/examples, started as their docstrings say, in a folder that has launch/."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import LAUNCH, environment
from support.marks import slow_except

EXAMPLES = LAUNCH / "examples"
HOSTS = ("plain", "ddp", "fsdp2", "deepspeed_engine", "accelerate_launch", "trainer")

COMPLAINTS = re.compile(r"warning|deprecated|^\W*(\[rank\d+\]:\[)?W\d{4} ", re.I)
# What neither the scripts nor their users can change.
EXCUSED = re.compile(
    r"all_gather_into_tensor. is deprecated"  # DeepSpeed calls it (0.19.8, torch 2.13)
    r"|register_constant\(\) on Enum subclasses is deprecated"  # torchao calls it, where transformers imports it
)


def command(script: str) -> list[str]:
    """Return the command in the docstring."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{script}.py").read_text()))
    assert docstring is not None and "\n" not in docstring
    return docstring.partition(": ")[2].split()


def losses(folder: Path, script: str, *flags: str) -> list[float]:
    """Run the command of a script in ``folder`` and return the losses that it prints."""
    launch = folder / "launch"
    if not launch.exists():
        launch.symlink_to(LAUNCH)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**environment(), "PATH": path}
    if script == "language_model":
        env.pop("DS_ACCELERATOR", None)  # rehearse_on_cpu() sets it before transformers imports DeepSpeed
    found = subprocess.run([*command(script), *flags], cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = (found.stdout + found.stderr).splitlines()
    assert [line for line in lines if COMPLAINTS.search(line) and not EXCUSED.search(line)] == []
    return [float(loss) for loss in re.findall(r"(?:: loss |'loss': ')([\d.]+)", found.stdout)]


@pytest.mark.parametrize("script", slow_except(["plain"], HOSTS))
def test_the_loss_falls_and_a_second_start_resumes(script: str, tmp_path: Path) -> None:
    first = losses(tmp_path, script)
    assert len(first) == 10 and first[0] > 1 and first[-1] < 0.1
    (runs,) = (tmp_path / "runs" / "examples").iterdir()
    saved = sorted(runs.iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert len(saved) == 10
    shutil.rmtree(saved[-1])  # as if the run had been killed in its last epoch
    assert losses(tmp_path, script) == first[-1:]


@pytest.mark.slow
def test_the_language_model_trains(tmp_path: Path) -> None:
    found = losses(tmp_path, "language_model", "--steps", "40", "--batch_size", "8")
    assert len(found) == 2 and found[0] > found[1] + 0.5


def test_the_scripts_differ_in_the_lines_of_their_hosts() -> None:
    texts = {script: (EXAMPLES / f"{script}.py").read_text().splitlines() for script in HOSTS}
    for script, lines in texts.items():
        assert len(lines) < 50
        others = [line for line in texts["plain"] if line not in lines]
        assert script == "trainer" or len(others) <= 16, (script, others)


def test_the_readme_has_every_command() -> None:
    cells = re.findall(r"^\| `(\w+)\.py` \|.*\| `(.+?)` \|$", (LAUNCH / "README.md").read_text(), re.M)
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {script: told.split() for script, told in cells if script in scripts} == {s: command(s) for s in scripts}
