"""Two emulated hosts, and a real two-node Slurm on them: jobs that are stopped, requeued and go on; other launchers.

RUN_SLURM=1 python -m pytest tests/launch/test_two_nodes.py, as root, with iproute2. Takes some minutes. Jobs also need
`apt-get install --no-install-recommends slurm-wlm munge`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster_emulation import Slurm, TwoHosts, missing
from support.launching import LAUNCH, accelerate, environment, losses, train

pytestmark = [
    pytest.mark.skipif(os.environ.get("RUN_SLURM") != "1", reason="takes minutes and root: RUN_SLURM=1 runs it"),
    pytest.mark.skipif(os.environ.get("RUN_SLURM") == "1" and missing() is not None, reason=str(missing())),
]
FLAGS = (
    *("--max_train_samples", 640, "--max_eval_samples", 128, "--num_hidden_layers", 2, "--per_device_train_batch_size"),
    *(32, "--statistics_interval", 3, "--learning_rate", 3e-3, "--logging_steps", 1),
)


def programs() -> dict[str, str]:
    """An environment in which the hosts find the programs beside this Python."""
    return {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(hosts: TwoHosts) -> Iterator[Slurm]:
    if reason := missing(slurm=True):
        pytest.skip(reason)
    with Slurm(hosts) as slurm:
        yield slurm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs are submitted: launch/ is there."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


def submit(slurm: Slurm, folder: Path, config: str, *flags: object) -> str:
    """Submit launch/slurm/train.sbatch for two processes on each node, and give the job's number."""
    options = ("--parsable", f"--chdir={folder}", "--gpus-per-node=0", "--time=00:20:00")
    file = folder / "launch/slurm/train.sbatch"
    return slurm.run("sbatch", *options, file, config, *FLAGS, *flags, env={**programs(), "PROCS_PER_NODE": "2"})


def wait(slurm: Slurm, job: str, *states: str, seconds: float = 300) -> None:
    """Wait until the job is in one of the states."""
    deadline = time.monotonic() + seconds
    while (state := slurm.state(job)["JobState"]) not in states:
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), state
        assert time.monotonic() < deadline, f"still {state}"
        time.sleep(1)


def said(folder: Path) -> str:
    """What a job has written, all starts of it."""
    (file,) = folder.glob("vit-*.out")
    return file.read_text(errors="replace")


def test_a_job_asked_to_stop_is_requeued_and_goes_on(slurm: Slurm, folder: Path) -> None:
    job = submit(slurm, folder, "fsdp2", "--max_train_steps", 30)
    output = folder / f"runs/vit-{job}"
    deadline = time.monotonic() + 200
    while not ((log := output / "metrics.jsonl").exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and slurm.state(job)["JobState"] in ("PENDING", "RUNNING"), said(folder)
        time.sleep(0.2)
    assert slurm.state(job)["NodeList"] == "node-a,node-b"
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@120 does
    wait(slurm, job, "COMPLETED", seconds=500)
    assert slurm.state(job)["Restarts"] == "1"
    text = said(folder)
    assert f"start 0 of job {job}: fsdp2 on node-a,node-b" in text and f"start 1 of job {job}" in text
    assert "asked to stop: saved after step" in text and "Resumed from" in text
    (checkpoint,) = output.glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < 30
    whole = train(folder / "whole", *FLAGS, "--max_train_steps", 30, launcher=accelerate("fsdp2", 4))
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert len(losses(output)) == 30 and losses(output) == losses(folder / "whole")


@pytest.mark.parametrize(("config", "host"), [("ddp", "DDP"), ("hsdp", "HSDP 2x2"), ("zero3", "ZeRO-3")], ids=str)
def test_every_configuration_trains_on_both_nodes(config: str, host: str, slurm: Slurm, folder: Path) -> None:
    job = submit(slurm, folder, config, "--max_train_steps", 7)
    wait(slurm, job, "COMPLETED")
    results = json.loads((folder / f"runs/vit-{job}/all_results.json").read_text())
    assert (results["processes"], results["steps"]) == (4, 7), results
    assert host in results["host"]


def test_torchrun_meets_over_the_network(hosts: TwoHosts, folder: Path) -> None:
    """Nodes have no numbers: the rendezvous gives them some."""
    command = ["torchrun", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=node-a:29500"]
    command += ["--rdzv_id=1", f"{folder}/launch/train_vit.py", "--output_dir", f"{folder}/run", *map(str, FLAGS)]
    hosts.run_on_both([[*command, "--max_train_steps", "7"]] * 2, programs(), timeout=300)
    results = json.loads((folder / "run/all_results.json").read_text())
    assert (results["processes"], results["steps"]) == (4, 7), results


def test_deepspeed_starts_from_a_hostfile(hosts: TwoHosts, folder: Path) -> None:
    """Without ssh: the launcher is started on each host, which gets its number."""
    (folder / "hostfile").write_text((LAUNCH / "hostfile.example").read_text().replace("slots=8", "slots=2"))
    command = ["deepspeed", "--hostfile", f"{folder}/hostfile", "--no_ssh", "--master_addr=node-a"]
    command += ["--master_port=29501", "--node_rank={host}", f"{folder}/launch/train_vit.py", *map(str, FLAGS)]
    command += ["--deepspeed_config", str(LAUNCH / "configs/zero3.json"), "--output_dir", f"{folder}/run"]
    command += ["--max_train_steps", "7"]
    commands = [[word.replace("{host}", str(host)) for word in command] for host in range(2)]
    hosts.run_on_both(commands, programs(), timeout=300)
    results = json.loads((folder / "run/all_results.json").read_text())
    assert (results["processes"], results["steps"]) == (4, 7), results


def test_a_pod_that_is_evicted_saves_the_run(hosts: TwoHosts, folder: Path) -> None:
    """SIGTERM goes to the first process of one pod."""
    output = folder / "run"
    names = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29503"}
    command = ["env", "--chdir", folder, "bash", "launch/node.sh", "fsdp2", "--output_dir", output, *FLAGS]
    pods = []
    for rank in range(2):
        env = {**programs(), **{f"PET_{name}": value for name, value in names.items()}, "PET_NODE_RANK": str(rank)}
        pods.append(hosts.start(rank, *command, "--max_train_steps", 2000, env=env, log=folder / f"{rank}.log"))
    deadline = time.monotonic() + 200
    while not ((log := output / "metrics.jsonl").exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and pods[0].poll() is None, (folder / "0.log").read_text()[-3000:]
        time.sleep(0.2)
    pods[1].terminate()
    assert all(pod.wait(timeout=100) != 0 for pod in pods)
    assert len(list(output.glob("checkpoint-*/complete.json"))) == 1


def test_the_exchange_is_measured_on_a_slow_link(tmp_path: Path) -> None:
    command = ["torchrun", "--nnodes=2", "--node_rank={host}", "--nproc_per_node=1", "--master_addr=node-a"]
    command += ["--master_port=29502", str(LAUNCH / "benchmark.py"), "ranks", "--host=hsdp", "--hidden_size=48"]
    command += ["--num_hidden_layers=1", "--steps=3", "--interval=2", "--only", "shampoo4"]
    command += [f"--output_dir={tmp_path}"]
    with TwoHosts(rate_mbit=1000, delay_ms=1) as hosts:
        commands = [[word.replace("{host}", str(host)) for word in command] for host in range(2)]
        first, _ = hosts.run_on_both(commands, programs(), timeout=300)
    assert "hsdp on 2 ranks" in first and "Shampoo4, refresh" in first, first
