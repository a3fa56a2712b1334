"""Launches without their cost: real launchers say what they would start, and the workers are forked.

A worker started afresh spends seconds on importing torch, accelerate, transformers and DeepSpeed. Here it is forked
from a server that has them loaded. Everything else is the launcher's own: ``accelerate launch`` and torchrun run their
own code up to the point where processes would start, which tells the environment, the script and its arguments.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from . import worlds
from .launching import environment, free_port

TIMEOUT = 300.0  # seconds of a launch


@dataclass
class Launch:
    """What a launcher starts on one machine."""

    command: list[str]  # the script and its arguments
    environment: dict[str, str]
    processes: int = 1  # on this machine
    machines: int = 1
    machine: int = 0
    elastic: bool = False  # by torchrun, which tells workers their ranks

    def worker_environment(self, local_rank: int, port: int) -> dict[str, str]:
        """The environment of a worker, as torchrun's agent sets it."""
        if not self.elastic:
            return self.environment
        rank, world = self.machine * self.processes + local_rank, self.machines * self.processes
        ours = {
            "LOCAL_RANK": local_rank,
            "RANK": rank,
            "GROUP_RANK": self.machine,
            "ROLE_RANK": rank,
            "ROLE_NAME": "default",
            "LOCAL_WORLD_SIZE": self.processes,
            "WORLD_SIZE": world,
            "GROUP_WORLD_SIZE": self.machines,
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": False,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1,
        }
        return {**self.environment, **{name: str(value) for name, value in ours.items()}}


# -- what a launcher would start ---------------------------------------------------------------------------------------


def capture(*command: object) -> Launch:
    """What ``accelerate launch``, torchrun or Python itself would start for this command line."""
    first, *rest = map(str, command)
    program = Path(first).name
    if first == sys.executable and rest[0] == "-m":
        _, program, *rest = rest
    with mock.patch.dict(os.environ, environment()):
        if program in ("accelerate", "accelerate.commands.accelerate_cli"):
            return _capture_accelerate(rest[1:])  # after "launch"
        if program in ("torchrun", "torch.distributed.run"):
            return _capture_torchrun(rest)
        if first != sys.executable:
            raise ValueError(f"no launcher that is known: {first}")
        return Launch(rest, dict(os.environ))


def _capture_accelerate(arguments: Sequence[str]) -> Launch:
    from accelerate.commands import launch as accelerate_launch

    started: list[Launch] = []

    def popen(command: Sequence[str], env: Mapping[str, str], **_: Any) -> Any:
        started.append(Launch(list(command[1:]), dict(env)))
        return mock.Mock(returncode=0)

    with _elastic_launches(started), mock.patch.object(accelerate_launch.subprocess, "Popen", popen):
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(arguments))
    return started[0]


def _capture_torchrun(arguments: Sequence[str]) -> Launch:
    from torch.distributed import run

    started: list[Launch] = []
    with _elastic_launches(started):
        run.run(run.get_args_parser().parse_args(arguments))
    return started[0]


@contextlib.contextmanager
def _elastic_launches(started: list[Launch]) -> Iterator[None]:
    """Where torchrun would start its agent, note what the agent was to run."""
    from torch.distributed import run

    def elastic_launch(config: Any, entrypoint: str) -> Any:
        def start(*arguments: str) -> None:
            assert entrypoint == sys.executable and arguments[0] == "-u", (entrypoint, arguments)
            machine = int(config.rdzv_configs.get("rank", 0)) if config.max_nodes > 1 else 0
            shape = (config.nproc_per_node, config.max_nodes, machine)
            started.append(Launch(list(arguments[1:]), dict(os.environ), *shape, elastic=True))

        return start

    with mock.patch.object(run, "elastic_launch", elastic_launch):
        yield


# -- starting it -------------------------------------------------------------------------------------------------------


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run what a launcher would start for this command line; its result, whatever the exit status."""
    return run_machines([command])[0]


def run_machines(commands: Sequence[Sequence[object]]) -> list[subprocess.CompletedProcess[str]]:
    """Run the launches of several machines as one; a result for each."""
    launches = [capture(*command) for command in commands]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            _Worker(launch, local, port, Path(folder)) for launch in launches for local in range(launch.processes)
        ]
        try:
            status = _wait(workers)
        finally:
            for worker in workers:
                worker.end()
        found = []
        for launch, command in zip(launches, commands, strict=True):
            own = [worker for worker in workers if worker.launch is launch]
            texts = ["".join(worker.read(stream) for worker in own) for stream in ("stdout", "stderr")]
            found.append(subprocess.CompletedProcess(list(map(str, command)), status, *texts))
        return found


class _Worker:
    """A process that runs a launch's script, forked from the server, with what it prints in files."""

    def __init__(self, launch: Launch, local_rank: int, port: int, folder: Path) -> None:
        self.launch = launch
        self.place = folder / f"{launch.machine}-{local_rank}"
        arguments = (launch.command, launch.worker_environment(local_rank, port), os.getcwd(), str(self.place))
        self.process = worlds.preloaded_context(worlds.PRELOADED_FOR_LAUNCHES).Process(target=_work, args=arguments)
        self.process.start()

    def read(self, stream: str) -> str:
        path = self.place.with_suffix(f".{stream}")
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _work(command: list[str], variables: Mapping[str, str], folder: str, place: str) -> None:
    """Be the worker: take its folder, environment, streams and arguments, and run the script as Python would."""
    gc.freeze()  # as ranks do: worlds.py
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{place}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    status = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(workers: Sequence[_Worker]) -> int:
    """Wait for all workers, or for the first that fails; the exit status of the launch."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        codes = [worker.process.exitcode for worker in workers]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if len(workers) == 1 else 1
        if all(code == 0 for code in codes):
            return 0
        multiprocessing.connection.wait([w.process.sentinel for w in workers if w.process.exitcode is None], 1.0)
    raise TimeoutError(f"{workers[0].launch.command[0]} did not end in {TIMEOUT:.0f} s")
