"""What the README tells people to write."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import forked
from support.launching import SCRIPTS
from support.scripts.readme_script import Model

from sharded_shampoo4 import estimate_memory

README = Path(__file__).parents[2] / "README.md"

HOSTS = (
    *("DDP, FSDP2, HSDP, tensor and expert parallelism", "FSDP2 with tensor or expert parallelism", "FSDP1"),
    *("DeepSpeed", "Accelerate", "HF Trainer", "Some of the ranks"),
)


def test_the_lines_for_every_host_train_with_shared_factors(tmp_path: Path) -> None:
    launcher = (Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", 2)
    found = forked.run(*launcher, SCRIPTS / "readme_script.py", tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.keys() == second.keys() == set(HOSTS)
    # Both layers' factors, no factor twice, and under every host the same ones.
    alone = estimate_memory(Model().named_parameters()).preconditioner[0]
    for host in HOSTS:
        (name, held), (_, held_too) = first[host], second[host]
        assert name == "Shampoo4" and held + held_too == alone and min(held, held_too) > 0, (host, held, held_too)


@pytest.mark.slow
def test_the_script_shows_the_difference() -> None:
    """Compare the best losses of both optimizers, and all losses with those in the README."""
    (script,) = (code for code in re.findall(r"```python\n(.+?)```", README.read_text(), re.S) if "load_digits" in code)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    printed, told = found.stdout.splitlines(), re.findall(r"^# (.+)", script, re.M)
    losses = [ast.literal_eval(line.partition(" ")[2]) for line in printed]
    assert min(losses[1].values()) < 0.5 * min(losses[0].values())
    for line, losses_now in zip(told, losses, strict=True):
        assert losses_now == pytest.approx(ast.literal_eval(line.partition(" ")[2]), rel=0.05)
