"""Step times of Shampoo4 on one process and on several, where inverse roots are most of the work.

python launch/bench_ranks.py [--world_size 2] [--matrices 8] [--order 512] [--rounds 5]

Every rank is a process with one thread, on gloo, and holds all parameters, as under DDP; gradients are replayed. The
parameters are square matrices, a block each, so the ranks share the factors evenly. A root step is one in which
statistics and roots are due; an ordinary one applies the roots and lets AdamW take its step. All ranks start a step
together, and its time is that of the slowest: median and least over the rounds. Processor time is that of the busiest
rank; it tells what elapsed time would be on cores that nobody else uses. Run it while the machine is idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that are started

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from sharded_shampoo4 import Shampoo4

KINDS = ("statistics and root", "ordinary")
Times = list[tuple[float, float]]  # of each step: elapsed and processor seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=2, help="processes (2)")
    parser.add_argument("--matrices", type=int, default=8, help="how many (8)")
    parser.add_argument("--order", type=int, default=512, help="rows and columns of each (512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind, after one for warming up (5)")
    flags = parser.parse_args()

    load = os.getloadavg()[0]
    alone, spread = (run(world_size, flags) for world_size in (1, flags.world_size))
    table = Table(
        title=f"{flags.matrices} matrices {flags.order} x {flags.order}, one thread per rank, load before {load:.1f}; "
        "milliseconds"
    )
    table.add_column("step")
    for column in ("1 rank", f"{flags.world_size} ranks", "ratio"):
        table.add_column(column, justify="right")
    for kind in KINDS:
        for name, index, best in (("median", 0, statistics.median), ("least", 0, min), ("processor", 1, min)):
            one, many = (best(step[index] for step in times[kind]) for times in (alone, spread))
            table.add_row(f"{kind}, {name}", f"{1e3 * one:.1f}", f"{1e3 * many:.1f}", f"{many / one:.2f}")
    Console(width=120).print(table)


def run(world_size: int, flags: argparse.Namespace) -> dict[str, Times]:
    """Times of the steps of each kind, those of the slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, (world_size, folder, flags.matrices, flags.order, flags.rounds), nprocs=world_size)
        ranks: list[dict[str, Times]] = [torch.load(f"{folder}/{rank}.pt") for rank in range(world_size)]
    slowest: dict[str, Times] = {}
    for kind in KINDS:
        steps = zip(*(times[kind] for times in ranks), strict=True)
        slowest[kind] = [(max(elapsed), max(processor)) for elapsed, processor in (zip(*s, strict=True) for s in steps)]
    return slowest


def on_a_rank(rank: int, world_size: int, folder: str, matrices: int, order: int, rounds: int) -> None:
    """Take steps of alternating kinds, and leave their times in ``folder``."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(order, order)) for _ in range(matrices)]
    gradients = [[torch.randn(order, order) for _ in parameters] for _ in range(4)]
    optimizer = Shampoo4(parameters, statistics_interval=2, root_interval=2)
    times: dict[str, Any] = {kind: [] for kind in KINDS}
    for step in range(1, 2 * rounds + 4):
        for parameter, gradient in zip(parameters, gradients[step % len(gradients)], strict=True):
            parameter.grad = gradient.clone()
        if world_size > 1:
            dist.barrier()
        started = time.perf_counter(), time.process_time()
        optimizer.step()
        taken = time.perf_counter() - started[0], time.process_time() - started[1]
        if step > 3:  # both kinds have come once
            times[KINDS[step % 2]].append(taken)
    torch.save(times, f"{folder}/{rank}.pt")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
