"""How long the host is busy with an ordinary step: in Python and in PyTorch, without the kernels.

    python tests/host_time.py                  # ViT-B in one process and on one of 8 ranks under FSDP2
    python tests/host_time.py --profile 30     # and the functions that take longest

ViT-B's parameters with sides of 1/32 of their lengths, blocks and batches likewise: as many blocks, batches and pieces
as there really are, but kernels that take next to no time. An ordinary step is one with inverse roots in which neither
statistics nor roots are due. The base is AdamW with ``foreach``, whose own time is shown beside it. Times are processor
time of this process in ms, the least of many steps; other programs on the machine still prolong it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from support.meta_steps import RANK, VIT_B, FakeRanks
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.planning import plan

SHRINK = 32  # of a side; 4-bit factors from the order that is 64 / SHRINK on
OPTIONS: dict[str, Any] = {
    "max_preconditioner_dim": 1024 // SHRINK, "quant_block_size": 64 // SHRINK, "min_quant_numel": 4,
    "method": "shampoo", "scratch_mib": 1, "statistics_interval": 100, "root_interval": 100, "interval_warmup": False,
}  # fmt: skip


def shrunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of 1/32 of the rows and columns; a convolution's as the matrix that it is."""
    rows, *columns = (size for size in shape if size > 1)
    matrix = (rows, torch.Size(columns).numel()) if columns else (rows,)
    return tuple(-(-size // SHRINK) for size in matrix)


def least(step: Callable[[], object], parameters: Mapping[str, nn.Parameter], rounds: int) -> float:
    """The least processor time of ``step``, in ms; every parameter has a new gradient each time."""
    times = []
    for _ in range(rounds):
        set_gradients(parameters)
        begun = time.process_time()
        step()
        times.append(time.process_time() - begun)
    return 1e3 * min(times)


def set_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)


def measure(parameters: Mapping[str, nn.Parameter], rounds: int, shown: int) -> dict[str, float]:
    """Times of this rank's steps, and Python function calls of one."""
    adamw = torch.optim.AdamW(parameters.values(), foreach=True)
    optimizer = Shampoo4(parameters.items(), foreach=True, **OPTIONS)
    found = {"AdamW": least(adamw.step, parameters, rounds)}
    found["before roots"] = least(optimizer.step, parameters, 98)
    least(optimizer.step, parameters, 2)  # the last with statistics and roots
    gc.disable()
    found["ordinary"] = least(optimizer.step, parameters, rounds)
    set_gradients(parameters)
    with cProfile.Profile() as profile:
        optimizer.step()
    gc.enable()
    statistics = pstats.Stats(profile)
    found["calls"] = statistics.total_calls  # type: ignore[attr-defined]
    if shown:
        statistics.sort_stats("tottime").print_stats(shown)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps of which the fastest counts (60, at most 90)")
    parser.add_argument("--profile", type=int, default=0, help="functions to show, longest first (0)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    plan.BATCH_ELEMENTS_PER_MIB = plan.BATCH_ELEMENTS_PER_MIB * 256 // SHRINK**2  # of 1 MiB instead of 256
    shapes = {name: shrunk(shape) for name, shape in VIT_B.items()}
    alone = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    show("1 rank", measure(alone, flags.rounds, flags.profile))
    with FakeRanks(RANK, 8, shapes, "cpu") as ranks:
        show("rank 3 of 8", measure(ranks.parameters(), flags.rounds, flags.profile))


def show(who: str, found: Mapping[str, float]) -> None:
    own = found["ordinary"] - found["AdamW"]
    print(
        f"{who}: {found['ordinary']:.2f} ms, {own:.2f} of them not AdamW's; before the first roots "
        f"{found['before roots']:.2f} ms; {found['calls']:.0f} calls of functions"
    )


if __name__ == "__main__":
    main()
