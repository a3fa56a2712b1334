"""Stands in for srun: starts the task of each of SLURM_NNODES nodes on this machine.

As the real one (seen in 22.05 with proctrack/linuxproc), it hands USR1 to all processes of all tasks, also to those
that have a session of their own. A task that fails ends the others: --kill-on-bad-exit.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *itertools.chain.from_iterable(family(int(child)) for child in children)]
    return []


def main() -> int:
    command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]

    def to_all(number: int) -> None:
        for pid in (pid for task in tasks for pid in family(task.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGUSR1, lambda number, _: to_all(number))
    while None in (statuses := [task.poll() for task in tasks]):
        if any(statuses):
            time.sleep(2)
            to_all(signal.SIGKILL)
        time.sleep(0.1)
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main())
