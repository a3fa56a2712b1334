"""Search for every optimizer's best learning rate, train with it for several seeds, and show all side by side."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import statistics
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from plots import COLORS, label_logarithms, number_table, picture, told_seeds
from rich.console import Console

from .optimizers import RIVALS, Rival, state_bytes
from .tasks import DEVICE, TASKS, Task

_WARM_UP = 0.1  # share of the steps
_LAST = 0.25  # share of the steps whose mean is the training loss: an epoch of four
_RATES = (5e-4, 3.2e-2)  # between which learning rates are searched, by factors of two
Result = dict[str, Any]


def run(task: Task, rival: Rival, lr: float, seed: int, steps: int) -> Result:
    """Train once. Returns losses and figures; the loss is infinite where training diverges."""
    torch.set_num_threads(1)
    model, batches = task.make_model(seed, task.hidden_size).to(DEVICE), task.batches(seed)
    optimizers = rival.make(model, task)
    losses, seconds, started = [], 0.0, _now()
    for step in range(steps):
        share = (step + 1) / steps
        scale = share / _WARM_UP if share < _WARM_UP else task.schedule((share - _WARM_UP) / (1 - _WARM_UP))
        model.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"losses": losses, "training loss": math.inf, task.judged_by: math.inf}
        began = _now()
        with rival.around():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * scale
                optimizer.step()
        seconds += _now() - began
    model.eval()
    with torch.no_grad():
        figures = task.evaluate(model)
    return {
        "training loss": statistics.mean(losses[-int(_LAST * steps) :]),
        **figures,
        "state bytes": state_bytes(optimizers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer seconds": seconds,
        "seconds": _now() - started,
        "losses": losses,
    }


def _now() -> float:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def run_and_store(
    task: str, hidden_size: int, whole: int, name: str, lr: float, seed: int, steps: int, path: Path
) -> None:
    """Train once, by names that a process of its own can look up, and write the result."""
    print(f"{task}: {name}, hidden size {hidden_size}, learning rate {lr:g}, seed {seed}, {steps} steps", flush=True)
    own = dataclasses.replace(TASKS[task], hidden_size=hidden_size, steps=whole)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(run(own, RIVALS[name], lr, seed, steps)))
    draft.replace(path)


def make_workers(count: int) -> Executor:
    """Make what runs ``count`` trainings at a time: processes, or this one for a single one."""
    spawn = multiprocessing.get_context("spawn")
    return ThreadPoolExecutor(1) if count == 1 else ProcessPoolExecutor(count, spawn)


class Contest:
    """The runs of one task, each stored in a file of its own: a run that is there is not made again.

    Args:
        task: what is trained.
        folder: where the files go, in a folder with the task's name.
        workers: what makes the runs.
    """

    def __init__(self, task: Task, folder: Path, workers: Executor) -> None:
        self.task, self.folder, self.workers = task, folder / task.name, workers
        self.folder.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, rates: Sequence[float], seeds: Sequence[int], steps: int) -> list[Result]:
        """Return the results for all learning rates and seeds, from their files where they are there."""
        paths, awaited = [], []
        for lr, seed in itertools.product(rates, seeds):
            paths.append(self.folder / f"{name}-{lr:g}-seed{seed}-{steps}steps.json")
            if not paths[-1].exists():
                own = (self.task.name, self.task.hidden_size, self.task.steps, name, lr, seed, steps, paths[-1])
                awaited.append(self.workers.submit(run_and_store, *own))
        for future in awaited:
            future.result()
        return [json.loads(path.read_text()) for path in paths]

    def best_rate(self, name: str) -> float:
        """Find the learning rate that is better than its half and its double, in runs of a third of the length."""
        losses = self.search(name, self.first_rate(name), 1, [0], self.task.steps // 3, _RATES)
        return min(losses, key=losses.__getitem__)

    def first_rate(self, name: str) -> float:
        """Return the learning rate at which a search begins."""
        return self.task.start * RIVALS[name].multiple

    def search(
        self,
        name: str,
        first: float,
        beside: int,
        seeds: Sequence[int],
        steps: int,
        limits: tuple[float, float] = (0.0, math.inf),
    ) -> dict[float, float]:
        """Try learning rates by factors of two until the best one has ``beside`` others on each side.

        Args:
            name: of the optimizer.
            first: the learning rate at which to begin.
            beside: how many rates on each side, unless they are beyond ``limits``.
            seeds: whose mean loss is taken.
            steps: of each run.
            limits: lowest and highest learning rate.

        Returns:
            The loss of each learning rate.
        """
        lowest, highest = limits
        losses: dict[float, float] = {}
        best = first
        while True:
            near = [best * 2.0**power for power in range(-beside, beside + 1)]
            new = [lr for lr in near if lowest * 0.99 < lr < highest * 1.01 and lr not in losses]
            results = iter(self.train(name, new, seeds, steps))
            for lr in new:
                losses[lr] = statistics.mean(next(results)[self.task.judged_by] for _ in seeds)
            found = min(losses, key=losses.__getitem__)
            if found == best:
                return dict(sorted(losses.items()))
            best = found

    def results(self, name: str, seeds: Sequence[int]) -> tuple[float, list[Result]]:
        """Return the best learning rate, and the results of whole runs with it."""
        lr = self.best_rate(name)
        return lr, self.train(name, [lr], seeds, self.task.steps)


def compare(names: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], folder: Path, workers: int = 1) -> None:
    """Make all runs, then print a table for each task and draw one picture.

    Args:
        names: keys of ``RIVALS``.
        tasks: keys of ``TASKS``.
        seeds: of the whole runs.
        folder: for the runs and the picture.
        workers: runs at a time. Each but a single one has its own process.

    Raises:
        ImportError: an optimizer's package is missing.
    """
    for name, own in itertools.product(names, [TASKS[task] for task in tasks]):
        RIVALS[name].make(own.make_model(0, own.hidden_size), own)  # what is missing shows now, not after hours
    with make_workers(workers) as pool, ThreadPoolExecutor(len(names) * len(tasks)) as searches:
        started: dict[tuple[str, str], Future[tuple[float, list[Result]]]] = {}
        for task, name in itertools.product(tasks, names):
            started[task, name] = searches.submit(Contest(TASKS[task], folder, pool).results, name, seeds)
        found = {task: {name: started[task, name].result() for name in names} for task in tasks}
    for task in tasks:
        print_table(TASKS[task], found[task])
    draw(found, seeds, folder / "rivals.png")
    print(f"picture  {folder / 'rivals.png'}")


def print_table(task: Task, found: dict[str, tuple[float, list[Result]]]) -> None:
    """One line for each optimizer: means over seeds, and each seed's figures."""
    figures = [
        name for name in ("training loss", "test accuracy", "test loss", "validation loss") if name in _any(found)
    ]
    columns = ("learning rate", *figures, "bytes a parameter", "optimizer ms a step", "seconds")
    table = number_table(task.title, "optimizer", columns)
    for name, (lr, results) in found.items():
        steps = len(results[0]["losses"])
        table.add_row(
            RIVALS[name].label,
            f"{lr:g}",
            *(_mean_and_all([result[figure] for result in results]) for figure in figures),
            f"{results[0]['state bytes'] / results[0]['parameters']:.2f}",
            f"{statistics.mean(result['optimizer seconds'] for result in results) / steps * 1000:.0f}",
            f"{statistics.mean(result['seconds'] for result in results):.0f}",
        )
    Console(width=200).print(table)


def _any(found: dict[str, tuple[float, list[Result]]]) -> Result:
    return next(iter(found.values()))[1][0]


def _mean_and_all(values: list[float]) -> str:
    each = " ".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ({each})" if len(values) > 1 else each


def draw(found: dict[str, dict[str, tuple[float, list[Result]]]], seeds: Sequence[int], path: Path) -> None:
    """Draw training loss over steps, means over seeds, a panel for each task; and the state, in the same colors."""
    widths = [3.0] * len(found) + [2.0]
    with picture(path, columns=len(widths), size=(2 * sum(widths), 5.4), width_ratios=widths) as (figure, panels):
        for panel, (task, by_name) in zip(panels, found.items(), strict=False):
            for name, (_, results) in by_name.items():
                mean = torch.tensor([result["losses"] for result in results]).mean(0)
                width = max(1, len(mean) // 60)
                smooth = mean[: len(mean) // width * width].view(-1, width).mean(1)
                steps = [(index + 0.5) * width for index in range(len(smooth))]
                panel.plot(steps, smooth.tolist(), color=COLORS[name], label=RIVALS[name].label)
            drawn = [line.get_ydata() for line in panel.get_lines()]
            panel.set(title=TASKS[task].title.replace(", ", "\n"), xlabel="step", ylabel="training loss", yscale="log")
            panel.set_ylim(top=max(losses[len(losses) // 10] for losses in drawn))  # of the time after the warm-up
            label_logarithms(panel.yaxis)
            panel.legend(fontsize="x-small")
        last, bars = list(found.values())[-1], panels[-1]
        held = {name: results[0]["state bytes"] / results[0]["parameters"] for name, (_, results) in last.items()}
        labels = [textwrap.fill(RIVALS[name].label, 26, break_on_hyphens=False) for name in held]
        bars.barh(labels, list(held.values()), color=[COLORS[name] for name in held])
        bars.invert_yaxis()
        bars.tick_params(axis="y", labelsize="small")
        model = TASKS[next(reversed(found))].title.partition(" of ")[0]
        bars.set(title=f"optimizer state\n{model}", xlabel="bytes per parameter")
        figure.suptitle(told_seeds(seeds))
