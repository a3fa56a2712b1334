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
from support import forked
from support.launching import LAUNCH, Finished, environment
from support.marks import slow_except

from sharded_shampoo4 import checkpoint

EXAMPLES = LAUNCH / "examples"
HOSTS = ("plain", "ddp", "fsdp2", "deepspeed_engine", "accelerate_launch", "trainer")

COMPLAINTS = re.compile(r"warning|deprecated|failed to load|^\W*(\[rank\d+\]:\[)?W\d{4} ", re.I)


def command(script: str) -> list[str]:
    """Return the command in the docstring."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{script}.py").read_text()))
    assert docstring is not None and "\n" not in docstring
    return docstring.partition(": ")[2].split()


def start(*words: str) -> Finished:
    """Run a command as a shell would that has an activated environment and knows nothing of DeepSpeed."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**environment(), "PATH": path}
    del env["DS_ACCELERATOR"]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=280)


def losses(found: Finished) -> list[float]:
    """The losses that a script has printed, and nothing to complain of."""
    assert found.returncode == 0, found.stderr[-3000:]
    lines = (found.stdout + found.stderr).splitlines()
    assert [line for line in lines if COMPLAINTS.search(line)] == []
    return [float(loss) for loss in re.findall(r"(?:: loss |'loss': ')([\d.]+)", found.stdout)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has launch/: the working directory of a test."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("script", slow_except(["plain"], HOSTS))
def test_the_loss_falls_and_a_second_start_resumes(script: str, folder: Path) -> None:
    """The first start is real; workers of the second are forked."""
    first = losses(start(*command(script)))
    assert len(first) == 10 and first[0] > 1 and first[-1] < 0.1
    (runs,) = (folder / "runs" / "examples").iterdir()
    saved = sorted(runs.iterdir(), key=lambda place: int(place.name.rpartition("-")[2]))
    assert len(saved) == 10
    shutil.rmtree(saved[-1])  # as if the run had been killed in its last epoch
    again = [sys.executable if word == "python" else word for word in command(script)]
    assert losses(forked.run(*again)) == first[-1:]


@pytest.mark.slow
def test_the_language_model_trains(folder: Path) -> None:
    flags = ("--steps", "40", "--batch_size", "8")
    found = losses(start(*command("language_model"), *flags))
    assert len(found) == 2 and found[0] > found[1] + 0.5


@pytest.mark.parametrize("steps", [1, 9])
def test_the_language_model_takes_few_steps(steps: int, folder: Path) -> None:
    """Fewer than ten: none is a tenth of them."""
    script = str(LAUNCH / "examples" / "language_model.py")
    found = forked.run(sys.executable, script, "--steps", str(steps), "--batch_size", "2")
    assert found.returncode == 0, found.stderr[-3000:]


def test_an_offloaded_optimizer_stays_what_it_is(folder: Path) -> None:
    """Accelerate would replace it by DeepSpeed's Adam for the CPU, of which no portable checkpoint can be saved."""
    flags = ("--use_deepspeed", "--zero_stage", "2", "--offload_optimizer_device", "cpu", "--num_processes", "2")
    found = forked.run("accelerate", "launch", *flags, "--main_process_port", "0", *command("accelerate_launch")[-1:])
    assert found.returncode == 0, found.stderr[-3000:]
    saved = list(folder.glob(f"runs/examples/accelerate/*/shampoo4/{checkpoint.MANIFEST}"))
    assert len(saved) == 10


def test_the_scripts_differ_in_the_lines_of_their_hosts() -> None:
    texts = {script: (EXAMPLES / f"{script}.py").read_text().splitlines() for script in HOSTS}
    for script, lines in texts.items():
        assert len(lines) <= 50
        others = [line for line in texts["plain"] if line not in lines]
        assert script == "trainer" or len(others) <= 16, (script, others)


def test_the_readme_has_every_command() -> None:
    cells = re.findall(r"^\| `(\w+)\.py` \|.*\| `(.+?)` \|$", (LAUNCH / "README.md").read_text(), re.M)
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {script: told.split() for script, told in cells if script in scripts} == {s: command(s) for s in scripts}
