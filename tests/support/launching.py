"""Helpers of the launch tests: run the training script as a user would, and write tiny data sets."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "support" / "scripts"
LAUNCH = ROOT / "launch"
sys.path.insert(0, str(LAUNCH))  # where `python launch/train_vit.py` puts it

Finished = subprocess.CompletedProcess[str]
TIMES = ("images_per_second", "step_seconds", "peak_memory_bytes")  # what may differ between equal runs


def run_really(*command: object) -> Finished:
    """Run a command to its end; its result, whatever the exit status."""
    return subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)


def train(
    output_dir: Path, *flags: object, launcher: Sequence[object] = (), run: Callable[..., Finished] = run_really
) -> Finished:
    """Run train_vit.py in a process of its own, or by ``launcher``; its result, whatever the exit status.

    ``run`` is what runs the command: :func:`run_really`, or :func:`support.forked.run`.
    """
    command = (*(launcher or (sys.executable,)), LAUNCH / "train_vit.py", "--output_dir", output_dir, *flags)
    return run(*command)


def accelerate(config: str, processes: int) -> tuple[object, ...]:
    """The command that launches a script, to follow it, by a file of launch/configs."""
    command = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    file = LAUNCH / "configs" / f"{config}.yaml"
    return (*command, "--config_file", file, "--num_processes", processes, "--main_process_port", 0)


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def environment() -> dict[str, str]:
    """Offline, on the CPU, one thread a process."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CXX": "/bin/false",  # nothing is compiled at run time
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))),
    }


def results(output_dir: Path) -> dict[str, Any]:
    """all_results.json of a finished run."""
    return json.loads((output_dir / "all_results.json").read_text())


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the timings."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(output_dir: Path) -> list[float]:
    """The training losses of metrics.jsonl, in order."""
    return [line["loss"] for line in metrics(output_dir) if "loss" in line]


def write_idx(path: Path, array: np.ndarray) -> None:
    """An idx file of bytes, gzipped where the name says so."""
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
