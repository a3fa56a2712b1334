"""How long the host is busy with an ordinary step: in Python and in PyTorch, without the kernels.

    python tests/host_time.py                            # ViT-B in one process and on one of 8 ranks under FSDP2
    python tests/host_time.py --model llama --ranks 64   # Llama-2-7B on one of 64
    python tests/host_time.py --profile 30               # and the functions that take longest

The model's parameters with sides of 1/32 of their lengths, blocks and batches likewise: as many blocks, batches and
pieces as there really are, but kernels that take next to no time. Batches are those of an accelerator. An ordinary step
is one without a refresh. The base is AdamW with ``foreach``; AdamW's time for all parameters is shown beside it.
Times are processor time of this process in ms, the least of many steps; other programs on the machine still prolong it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from support.launching import LAUNCH
from support.meta_steps import VIT_B, FakeRanks
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.planning import copies, plan

SHRINK = 32  # of a side; quantized factors from the order that is 64 / SHRINK on
METHODS: dict[str, dict[str, Any]] = {
    "soap": {"max_preconditioner_dim": 256 // SHRINK},
    "shampoo": {"max_preconditioner_dim": 1024 // SHRINK, "root_interval": 100},
}
SCRATCH_MIB = 2048  # an accelerator's
MODELS = ("vit", "llama")


def shapes_of(model: str) -> Mapping[str, tuple[int, ...]]:
    """The shapes of ViT-B's or Llama-2-7B's parameters, by name."""
    if model == "vit":
        return VIT_B
    sys.path.append(str(LAUNCH))
    from memory import models

    return models.shapes_of("llama-7b")


class NoWork:
    """Stands for a collective that has been started."""

    def wait(self) -> None:
        """Return at once."""


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


def measure(parameters: Mapping[str, nn.Parameter], method: str, rounds: int, shown: int) -> dict[str, float]:
    """Times of this rank's steps, and Python function calls of one."""
    adamw = torch.optim.AdamW(parameters.values(), foreach=True)
    optimizer = Shampoo4(
        parameters.items(), foreach=True, method=method, quant_block_size=64 // SHRINK, min_quant_numel=4,
        scratch_mib=1, statistics_interval=100, interval_warmup=False, **METHODS[method],
    )  # fmt: skip
    found = {"AdamW": least(adamw.step, parameters, rounds)}
    least(optimizer.step, parameters, 100)  # the last with a refresh
    gc.disable()
    found["ordinary"] = least(optimizer.step, parameters, rounds)
    optimizer.base.step = lambda *_: None  # type: ignore[method-assign]
    found["without base"] = least(optimizer.step, parameters, rounds)
    del optimizer.base.step
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
    parser.add_argument("--model", choices=MODELS, default="vit", help="ViT-B or Llama-2-7B (vit)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8], help="numbers of ranks (1 8)")
    parser.add_argument("--method", choices=METHODS, default="soap", help="Shampoo4's method (soap)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of which the fastest counts (60, at most 90)")
    parser.add_argument("--profile", type=int, default=0, help="functions to show, longest first (0)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    plan.BATCH_ELEMENTS_PER_MIB = plan.BATCH_ELEMENTS_PER_MIB * SCRATCH_MIB // SHRINK**2  # for scratch_mib=1
    copies.SHORTEST_ROW //= SHRINK
    copies.LARGE_COPY //= SHRINK**2
    Ranks.start_all_to_all = lambda *_: NoWork()  # type: ignore[method-assign,assignment,return-value]
    shapes = {name: shrunk(shape) for name, shape in shapes_of(flags.model).items()}
    for size in flags.ranks:
        if size == 1:
            alone = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
            show("1 rank", measure(alone, flags.method, flags.rounds, flags.profile))
            continue
        with FakeRanks(size // 3 + 1, size, shapes, "cpu") as ranks:
            show(f"one of {size} ranks", measure(ranks.parameters(), flags.method, flags.rounds, flags.profile))


def show(who: str, found: Mapping[str, float]) -> None:
    print(
        f"{who}: {found['ordinary']:.2f} ms, {found['without base']:.2f} of them without the base, "
        f"{found['calls']:.0f} calls of functions; AdamW {found['AdamW']:.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
