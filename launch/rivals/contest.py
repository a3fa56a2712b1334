"""Search for every optimizer's best learning rate, train with it for several seeds, and show all side by side."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from plots import SERIES, number_table, picture
from rich.console import Console

from .optimizers import RIVALS, Rival, state_bytes
from .tasks import TASKS, Task

_WARM_UP = 0.1  # share of the steps
_LAST = 0.25  # share of the steps whose mean is the training loss: an epoch of four
_RATES = (5e-4, 3.2e-2)  # between which learning rates are searched, by factors of two
Result = dict[str, Any]


def run(task: Task, rival: Rival, lr: float, seed: int, steps: int) -> Result:
    """Train once. Returns losses and figures; the loss is infinite where training diverges."""
    torch.set_num_threads(1)
    model, batches = task.make_model(seed), task.batches(seed)
    optimizers = rival.make(model, task)
    losses, seconds, started = [], 0.0, time.perf_counter()
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
        began = time.perf_counter()
        with rival.around():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * scale
                optimizer.step()
        seconds += time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        figures = task.evaluate(model)
    return {
        "training loss": statistics.mean(losses[-int(_LAST * steps) :]),
        **figures,
        "state bytes": state_bytes(optimizers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "optimizer seconds": seconds,
        "seconds": time.perf_counter() - started,
        "losses": losses,
    }


class Contest:
    """The runs of one task, each stored in a file of its own: a run that is there is not made again."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder / task.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def result(self, name: str, lr: float, seed: int, steps: int) -> Result:
        """Return a run's result, from its file if it is there."""
        path = self.folder / f"{name}-{lr:g}-seed{seed}-{steps}steps.json"
        if not path.exists():
            print(f"{self.task.name}: {name}, learning rate {lr:g}, seed {seed}, {steps} steps", flush=True)
            found = run(self.task, RIVALS[name], lr, seed, steps)
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(found))
            draft.replace(path)
        stored: Result = json.loads(path.read_text())
        return stored

    def best_rate(self, name: str) -> float:
        """Find the learning rate that is better than its half and its double, in runs of a third of the length."""
        steps = self.task.steps // 3
        lowest, highest = _RATES

        def judged(lr: float) -> float:
            return float(self.result(name, lr, 0, steps)[self.task.judged_by])

        best = self.task.start * RIVALS[name].multiple
        while True:
            near = [lr for lr in (best / 2, best, best * 2) if lowest * 0.99 < lr < highest * 1.01]
            found = min(near, key=judged)
            if found == best:
                return best
            best = found

    def results(self, name: str, seeds: Sequence[int]) -> tuple[float, list[Result]]:
        """Return the best learning rate, and the results of whole runs with it."""
        lr = self.best_rate(name)
        return lr, [self.result(name, lr, seed, self.task.steps) for seed in seeds]


def compare(names: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Make all runs, then print a table for each task and draw one picture."""
    found = {}
    for task in tasks:
        contest = Contest(TASKS[task], folder)
        found[task] = {name: contest.results(name, seeds) for name in names}
        print_table(TASKS[task], found[task])
    draw(found, folder / "rivals.png")
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


def draw(found: dict[str, dict[str, tuple[float, list[Result]]]], path: Path) -> None:
    """Training loss over steps, means over seeds, a panel for each task; and the state."""
    colors = dict(zip(RIVALS, itertools.cycle((*SERIES[:2], *SERIES[3:5], SERIES[2], SERIES[5])), strict=False))
    with picture(path, columns=len(found) + 1, size=(6 * len(found) + 5, 4.6)) as (_, panels):
        for panel, (task, by_name) in zip(panels, found.items(), strict=False):
            for name, (_, results) in by_name.items():
                mean = torch.tensor([result["losses"] for result in results]).mean(0)
                width = max(1, len(mean) // 60)
                smooth = mean[: len(mean) // width * width].view(-1, width).mean(1)
                steps = [(index + 0.5) * width for index in range(len(smooth))]
                panel.plot(steps, smooth.tolist(), color=colors[name], label=RIVALS[name].label)
            panel.set(title=TASKS[task].title, xlabel="step", ylabel="training loss", yscale="log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        panels[0].legend(fontsize=9)
        last, bars = list(found.values())[-1], panels[-1]
        held = {name: results[0]["state bytes"] / results[0]["parameters"] for name, (_, results) in last.items()}
        bars.barh([RIVALS[name].label for name in held], list(held.values()), color=[colors[name] for name in held])
        bars.invert_yaxis()
        bars.set(title="optimizer state", xlabel="bytes for each parameter")
