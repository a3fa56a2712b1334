"""Whether the best learning rate stays where it is when a model gets wider."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plots import number_table
from rich.console import Console

from .contest import Contest, make_workers
from .optimizers import RIVALS
from .tasks import TASKS

NAMES = ("adamw", "shampoo4-paper", "shampoo4")
Losses = dict[tuple[str, int], dict[float, float]]  # optimizer, hidden size -> learning rate -> loss


def compare_widths(
    tasks: Sequence[str],
    hidden_sizes: Sequence[int],
    steps: int,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 1,
    beside: int = 2,
) -> dict[str, Losses]:
    """Search for the best learning rate at every width, print a table for each task, and return the losses.

    Args:
        tasks: keys of ``TASKS``.
        hidden_sizes: in the order of the search. Each begins at the best learning rate of the one before.
        steps: of every run, over which the learning rate goes up and down once.
        seeds: whose mean loss is taken.
        folder: for the runs.
        workers: runs at a time. Each but a single one has its own process.
        beside: how many learning rates are tried on each side of the best, by factors of two.
    """

    def search(task: str, name: str) -> Losses:
        found: Losses = {}
        first = None
        for hidden in hidden_sizes:
            own = dataclasses.replace(TASKS[task], hidden_size=hidden, steps=steps)
            contest = Contest(own, folder / f"hidden{hidden}", pool)
            losses = contest.search(name, first or contest.first_rate(name), beside, seeds, steps)
            found[name, hidden], first = losses, min(losses, key=losses.__getitem__)
        return found

    with make_workers(workers) as pool, ThreadPoolExecutor(len(tasks) * len(NAMES)) as searches:
        pairs = list(itertools.product(tasks, NAMES))
        parts = dict(zip(pairs, searches.map(search, *zip(*pairs, strict=True)), strict=True))
    found = {task: {key: losses for name in NAMES for key, losses in parts[task, name].items()} for task in tasks}
    for task, losses in found.items():
        print_widths(task, losses)
    return found


def print_widths(task: str, found: Losses) -> None:
    """One line for each optimizer and width, one column for each learning rate; a star at the best."""
    rates = sorted({lr for losses in found.values() for lr in losses})
    columns = ("hidden size", *(f"{lr:g}" for lr in rates))
    table = number_table(f"{task}: {TASKS[task].judged_by} by learning rate", "optimizer", columns)
    for (name, hidden), losses in found.items():
        best = min(losses, key=losses.__getitem__)
        cells = (f"{losses[lr]:.4f}{'*' * (lr == best)}" if lr in losses else "" for lr in rates)
        table.add_row(RIVALS[name].label, str(hidden), *cells)
    Console(width=200).print(table)
