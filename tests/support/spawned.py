"""Ranks in fresh processes, with a GPU each: CUDA does not work in forked ones, which ``worlds.py`` starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_spawned(backend: str, world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(rank, *args)``, a module's own, in as many processes; returns what they return, by rank.

    Raises what the first rank that failed has raised. ``folder`` is where they meet; tensors come back through it.
    """
    multiprocessing.spawn(_rank_main, (backend, world_size, folder, function, args), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank_main(
    rank: int, backend: str, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.barrier()  # no rank leaves while another still needs it
    os._exit(0)  # threads of process groups abort an ordinary exit now and then
