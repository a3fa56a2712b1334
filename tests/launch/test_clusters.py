"""The files of launch/ for clusters, with stand-ins for the clusters. test_two_nodes.py has real ones."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launching import LAUNCH, ROOT, SCRIPTS, environment, free_port, losses

CONFIGS = ("ddp", "fsdp2", "hsdp", "zero3")
JOB = "launch/slurm/train.sbatch"
BASH = [LAUNCH / "node.sh", LAUNCH / "slurm/train.sbatch"]
MANIFESTS = ("trainjob", "pytorchjob")
FLAGS = (
    *("--max_train_steps", 12, "--max_train_samples", 640, "--max_eval_samples", 128, "--num_hidden_layers", 2),
    *("--statistics_interval", 3, "--learning_rate", 3e-3, "--logging_steps", 1),
)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with launch/ in it, and stand-ins for Slurm's programs in bin/."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stand_in(bin_folder / "srun", f'exec {sys.executable} {SCRIPTS}/cluster_srun.py "$@"')
    stand_in(
        bin_folder / "scontrol", '[[ $2 = hostnames ]] && printf "127.0.0.1\\n127.0.0.2\\n" || echo "$@" >>requeued'
    )
    return tmp_path


def stand_in(path: Path, line: str) -> None:
    """A program of one line."""
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def job_environment(cluster: Path, **more: object) -> dict[str, str]:
    """What Slurm sets in a batch script on two nodes without GPUs."""
    names = {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "vit", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": 2, **more}
    path = f"{cluster / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), **{name: str(value) for name, value in names.items()}, "PATH": path}


def recorded_launches(cluster: Path) -> Iterator[list[str]]:
    """Make `accelerate` write its arguments down; then give them, one list for each node."""
    stand_in(cluster / "bin/accelerate", 'printf "%s\\0" "$@" >"$(mktemp said-XXXX)"')
    yield []
    for file in cluster.glob("said-*"):
        yield file.read_text().split("\0")[:-1]


def option(arguments: list[str], name: str) -> str:
    """What follows ``name``."""
    return arguments[arguments.index(name) + 1]


@pytest.mark.parametrize("script", BASH, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_sbatch_file_asks_for_what_a_requeued_job_needs() -> None:
    lines = (ROOT / JOB).read_text().splitlines()
    options = dict((line.removeprefix("#SBATCH --") + "=").split("=")[:2] for line in lines if "#SBATCH" in line)
    assert {"nodes": "2", "ntasks-per-node": "1", "requeue": "", "open-mode": "append"}.items() <= options.items()
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])  # to the batch shell alone, which hands it on
    assert "%j" in options["output"]  # the same after a requeue, hence append
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first_command:]), "Slurm reads none after the first command"


def test_a_job_needs_a_configuration_that_is_there(cluster: Path) -> None:
    env = job_environment(cluster, SLURM_NODEID=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for script in (JOB, "launch/node.sh"):
        command = ["bash", script, "fsdp3"]
        failed = subprocess.run(command, cwd=cluster, env=env, capture_output=True, text=True, timeout=30)
        assert failed.returncode == 2 and "there is no launch/configs/fsdp3.yaml" in failed.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_each_node_launches_its_own_part(config: str, cluster: Path) -> None:
    launches = recorded_launches(cluster)
    next(launches)
    command = ["bash", JOB, config, "--learning_rate", "0.1"]
    env = job_environment(cluster, SLURM_GPUS_ON_NODE=8, SLURM_CPUS_PER_TASK=16)
    subprocess.run(command, cwd=cluster, env=env, check=True, timeout=30)
    nodes = sorted(launches, key=lambda arguments: option(arguments, "--machine_rank"))
    assert [option(arguments, "--machine_rank") for arguments in nodes] == ["0", "1"]
    for arguments in nodes:
        assert arguments[0] == "launch"
        assert option(arguments, "--config_file") == f"launch/configs/{config}.yaml"
        assert (option(arguments, "--num_machines"), option(arguments, "--num_processes")) == ("2", "16")
        assert (option(arguments, "--main_process_ip"), option(arguments, "--main_process_port")) == (
            "127.0.0.1",
            "20007",
        )
        ours = arguments[arguments.index("launch/train_vit.py") :]
        assert (option(ours, "--output_dir"), option(ours, "--resume_from_checkpoint")) == ("runs/vit-7", "latest")
        assert ours[-2:] == ["--learning_rate", "0.1"]  # last, so the user's word counts
        if config == "hsdp":
            assert option(arguments, "--parallelism_config_dp_replicate_size") == "2"
            assert option(arguments, "--parallelism_config_dp_shard_size") == "8"
        assert ("standard" in arguments) == (config == "zero3")


@pytest.mark.parametrize("config", [None, "zero3"])
def test_a_script_of_ones_own_gets_its_own_flags_only(config: str | None, cluster: Path) -> None:
    """Also where launch/ lies elsewhere, as in a package that is installed."""
    launches = recorded_launches(cluster)
    next(launches)
    (cluster / "launch").rename(cluster / "elsewhere")
    command = ["bash", str(cluster / "elsewhere/slurm/train.sbatch"), *filter(None, [config]), "--my_flag", "3", "last"]
    env = job_environment(cluster, SCRIPT="my.py", LAUNCH="elsewhere")
    subprocess.run(command, cwd=cluster, env=env, check=True, timeout=30)
    nodes = list(launches)
    assert len(nodes) == 2
    for arguments in nodes:
        assert arguments[-4:] == ["my.py", "--my_flag", "3", "last"]
        assert option(arguments, "--config_file") == f"elsewhere/configs/{config or 'fsdp2'}.yaml"


def test_a_job_that_fails_is_not_requeued(cluster: Path) -> None:
    stand_in(cluster / "bin/accelerate", "exit 1")
    env = job_environment(cluster)
    failed = subprocess.run(["bash", JOB, "ddp"], cwd=cluster, env=env, timeout=30)
    assert failed.returncode == 1
    assert not (cluster / "requeued").exists()


@pytest.mark.slow
def test_usr1_saves_and_requeues_and_the_next_start_goes_on(cluster: Path) -> None:
    """Two nodes with a process each, as two launchers here; losses equal those of an uninterrupted run on two pods."""
    command = list(map(str, ("bash", JOB, "fsdp2", *FLAGS)))
    env, output = job_environment(cluster, MASTER_PORT=free_port()), cluster / "runs/vit-7"
    with (cluster / "log").open("w+") as log:
        job = subprocess.Popen(command, cwd=cluster, env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and job.poll() is None:
                if (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").read_text().count("\n") >= 3:
                    job.send_signal(signal.SIGUSR1)  # to the batch shell only, as B:USR1@120 does
                    break
                time.sleep(0.1)
            status = job.wait(timeout=100)
        finally:
            job.kill()
        log.seek(0)
        said = log.read()
    assert status == 0, said[-3000:]
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    (complete,) = output.glob("checkpoint-*/complete.json")
    stopped_at = json.loads(complete.read_text())["step"]
    assert 3 <= stopped_at < 12 and not (output / "all_results.json").exists()

    env["SLURM_RESTART_COUNT"] = "1"
    again = subprocess.run(command, cwd=cluster, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"Resumed from runs/vit-7/checkpoint-{stopped_at}" in again.stderr
    assert "FSDP2 on 2 processes" in again.stderr
    assert len(losses(output)) == 12
    assert losses(output) == losses(two_pods(cluster))


def two_pods(cluster: Path) -> Path:
    """Run what the pods of the TrainJob run, with one process each and FLAGS; where it was written."""
    command, _ = pod_of("trainjob")
    command = [word for word in command if not word.startswith("--")]
    command += map(str, ("--output_dir", cluster / "whole", *FLAGS))
    port, path = free_port(), f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pods = []
    for rank in range(2):
        env = {**environment(), "PATH": path, **pod_environment(rank, 1, port)}
        with (cluster / f"pod-{rank}.log").open("w") as log:
            pods.append(subprocess.Popen(command, cwd=cluster, env=env, stdout=log, stderr=log))
    try:
        statuses = [pod.wait(timeout=300) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert statuses == [0, 0], (cluster / "pod-0.log").read_text()[-3000:]
    assert json.loads((cluster / "whole/all_results.json").read_text())["host"] == "FSDP2 on 2 processes"
    return cluster / "whole"


def documents(manifest: str) -> list[dict[str, Any]]:
    """The resources of a manifest."""
    return list(yaml.safe_load_all((LAUNCH / f"kubernetes/{manifest}.yaml").read_text()))


def violations(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """What in ``value`` is against ``schema``, in the words of JSON schema that kubeflow_schemas.yaml uses."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not any(type(value) is types[name] for name in wanted):
        yield f"{path} is {value!r}, not of type {' or '.join(wanted)}"
        return
    if value not in schema.get("enum", [value]):
        yield f"{path} is {value!r}, not one of {schema['enum']}"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        yield f"{path} is {value!r}, against {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{path} is {value}, less than {schema['minimum']}"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{path}[{number}]")
    if isinstance(value, dict):
        yield from (f"{path} lacks {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            if inner is False:
                yield f"{path} has no field {name}"
            else:
                yield from violations(item, inner, f"{path}.{name}")


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_agree_with_their_schemas(manifest: str) -> None:
    schemas = yaml.safe_load((ROOT / "tests" / "support" / "kubeflow_schemas.yaml").read_text())
    for document in documents(manifest):
        assert not list(violations(document, schemas[document["kind"]]))
        wrong = copy.deepcopy(document)
        wrong["spec"]["nodes"] = 2
        assert list(violations(wrong, schemas[document["kind"]])) == [".spec has no field nodes"]


def test_kubeflows_own_models_take_the_train_job() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    pods = [replica["template"] for replica in documents("pytorchjob")[0]["spec"]["pytorchReplicaSpecs"].values()]
    for model, document in (
        *((getattr(models, f"TrainerV1alpha1{document['kind']}"), document) for document in documents("trainjob")),
        *((models.IoK8sApiCoreV1PodTemplateSpec, pod) for pod in pods),
    ):
        assert not list(lost(document, model.from_dict(document).to_dict()))


def lost(given: Any, understood: Any, path: str = "") -> Iterator[str]:
    """What of ``given`` a model did not understand: it leaves out what it does not know."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for name, value in given.items():
            yield from lost(value, understood.get(name), f"{path}.{name}")
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for number, (value, other) in enumerate(zip(given, understood, strict=True)):
            yield from lost(value, other, f"{path}[{number}]")
    elif given != understood:
        yield f"{path} is {given!r}, understood as {understood!r}"


def pod_of(manifest: str) -> tuple[list[str], int]:
    """Command with arguments, and processes, of a pod."""
    if manifest == "trainjob":
        trainer = documents(manifest)[1]["spec"]["trainer"]
        return [*trainer["command"], *trainer["args"]], trainer["numProcPerNode"]
    spec = documents(manifest)[0]["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]], int(spec["nprocPerNode"])


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_each_pod_launches_its_own_part(manifest: str, cluster: Path) -> None:
    command, processes = pod_of(manifest)
    env = {**environment(), "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", **pod_environment(1, processes, 23456)}
    launches = recorded_launches(cluster)
    next(launches)
    subprocess.run(command, cwd=cluster, env=env, check=True, timeout=30)
    (arguments,) = launches
    assert option(arguments, "--config_file") == "launch/configs/fsdp2.yaml"
    assert option(arguments, "--machine_rank") == "1"
    assert option(arguments, "--num_processes") == str(2 * processes)
    assert option(arguments, "--main_process_port") == "23456"
    flags = arguments[arguments.index("launch/train_vit.py") + 1 :]
    from vit.args import parse_args  # takes a while: it imports transformers

    assert parse_args(flags).training.output_dir.startswith("/runs/")  # the volume's

    ours = [word.replace("launch/train_vit.py", "my.py") for word in command if not word.startswith("--")]
    for file in cluster.glob("said-*"):
        file.unlink()
    subprocess.run([*ours, "--my_flag"], cwd=cluster, env=env, check=True, timeout=30)
    (file,) = cluster.glob("said-*")
    assert file.read_text().split("\0")[-3:-1] == ["my.py", "--my_flag"]


def pod_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What both of Kubeflow's operators set in a pod, of two."""
    names = {"NNODES": 2, "NPROC_PER_NODE": processes, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    return {f"PET_{name}": str(value) for name, value in {**names, "MASTER_PORT": port}.items()}
