"""What clusters do to runs: ask them to stop, and start them again. What gets a signal is a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import forked
from support.launching import LAUNCH, accelerate, environment, free_port, losses, train
from support.marks import slow_except

FLAGS = (
    *("--max_train_steps", 24, "--max_train_samples", 640, "--max_eval_samples", 128, "--num_hidden_layers", 2),
    *("--statistics_interval", 3, "--learning_rate", 3e-3, "--logging_steps", 1),
)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train: a launcher's children, or the process itself."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found] or [process.pid]


def ask_to_stop(folder: Path, number: signal.Signals, *launcher: object) -> int:
    """Train, send a signal to one of the processes after the third step, and give the exit status."""
    command = [*(launcher or (sys.executable,)), LAUNCH / "train_vit.py", "--output_dir", folder, *FLAGS]
    with (folder.parent / "log.txt").open("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment(), stdout=log, stderr=log, text=True)
        for _ in range(1200):
            time.sleep(0.1)
            if process.poll() is not None:
                break
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 3:
                os.kill(workers(process)[-1], number)
                break
        try:
            status = process.wait(timeout=120)
        finally:
            process.kill()
        log.seek(0)
        assert "asked to stop: saved after step" in log.read()
    return status


def start_by_hand(rank: int, port: int, folder: Path, fsdp: bool, *flags: object) -> subprocess.Popen[bytes]:
    """One of two processes, without a launcher that would end the one when the other dies."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if fsdp:
        names.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"})
    command = [
        sys.executable,
        LAUNCH / "train_vit.py",
        "--output_dir",
        folder,
        *FLAGS,
        "--max_train_steps",
        2000,
        *flags,
    ]
    log = (folder.parent / f"{rank}.txt").open("wb")
    own = {**environment(), **{name: str(value) for name, value in names.items()}}
    return subprocess.Popen(list(map(str, command)), env=own, stdout=log, stderr=log)


@pytest.mark.parametrize(
    ("number", "timeout"), slow_except([(signal.SIGKILL, 1800)], [(signal.SIGKILL, 1800), (signal.SIGSTOP, 8)])
)
def test_no_process_waits_for_one_that_is_gone(number: signal.Signals, timeout: int, tmp_path: Path) -> None:
    """Killed: its connections break at once. Stuck: within --ddp_timeout."""
    folder, port = tmp_path / "run", free_port()
    stuck = number == signal.SIGSTOP
    processes = [start_by_hand(rank, port, folder, stuck, "--ddp_timeout", timeout) for rank in range(2)]
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (
            (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 3
        ):
            time.sleep(0.1)
        processes[1].send_signal(number)
        begun = time.monotonic()
        assert processes[0].wait(timeout=100) != 0
        seconds = time.monotonic() - begun
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert (timeout - 2 if stuck else 0) < seconds < (timeout if stuck else 0) + 25, seconds
    said = (tmp_path / "0.txt").read_text()
    assert "Error" in said and ("Timed out" in said or "timed out" in said or not stuck), said[-2000:]


@pytest.mark.parametrize(
    ("number", "host"), slow_except([(signal.SIGTERM, None)], [(signal.SIGTERM, None), (signal.SIGUSR1, "fsdp2")])
)
def test_a_run_that_is_asked_to_stop_saves_itself_and_goes_on(
    number: signal.Signals, host: str | None, tmp_path: Path
) -> None:
    launcher = accelerate(host, 2) if host else ()
    status = ask_to_stop(tmp_path / "stopped", number, *launcher)
    assert status == (
        1 if host else 75
    )  # torchrun, which accelerate starts, gives 1 for whatever its processes end with
    kept = sorted((tmp_path / "stopped").glob("checkpoint-*/complete.json"))
    assert len(kept) == 1
    assert not (tmp_path / "stopped" / "all_results.json").exists()
    resumed = train(
        tmp_path / "stopped", *FLAGS, "--resume_from_checkpoint", "latest", launcher=launcher, run=forked.run
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole = train(tmp_path / "whole", *FLAGS, launcher=launcher, run=forked.run)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    weights, again = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "stopped"))
    assert all((weights[name] == again[name]).all() for name in weights)
