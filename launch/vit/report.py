"""The log, tables and pictures of a run."""

from __future__ import annotations

import itertools
import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from plots import BLUE, GRAY, RED, format_bytes, label_logarithms, number_table, picture


class MetricsLog:
    """A file with one JSON object per line, such as ``metrics.jsonl``. Only the main process should have one."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Keep the lines up to step ``resumed_at``; 0 keeps none. The run writes later lines again."""
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= resumed_at] if resumed_at else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and close the file, so that the line is on disk at once."""
        with self.path.open("a") as file:
            file.write(json.dumps({name: _finite(value) for name, value in values.items()}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Read all lines."""
        return read_lines(self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read all lines of a log, except a last line that is incomplete."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_tables(results: dict[str, Any]) -> None:
    """Print a summary of the run, and the bytes of its optimizer's state beside those of others."""
    from rich.console import Console
    from rich.table import Table

    summary = Table(title=title(results), show_header=False, title_style="bold")
    summary.add_column(style="cyan")
    summary.add_column(justify="right")
    for name, value in (
        ("evaluation accuracy", f"{results['eval_accuracy']:.2%}  (best {results['best_eval_accuracy']:.2%})"),
        ("evaluation loss", f"{results['eval_loss']:.4f}"),
        ("training loss, last epoch", f"{results['train_loss']:.4f}"),
        ("steps, epochs", f"{results['steps']:,} in {results['epochs']:g}"),
        ("running as", results["host"]),
        ("time", f"{results['total_seconds']:.1f} s"),
        ("parameters", f"{results['parameters']:,}"),
        ("peak memory", format_bytes(results["peak_memory_bytes"])),
    ):
        summary.add_row(name, value)

    held = results["state_bytes_per_process"]
    rows = {f"process {rank}, measured" if held[1:] else "this run, measured": each for rank, each in enumerate(held)}
    if held[1:]:
        rows["all processes"] = {key: sum(each[key] for each in held) for key in held[0]}
    names = {"adamw": "AdamW alone", "float32": "the same in float32"}
    rows |= {f"{names[key]}, computed": each for key, each in results["estimated_state_bytes"].items()}
    memory = number_table("optimizer state" + " of a process" * bool(held[1:]), "", ("preconditioner", "base", "total"))
    for name, each in rows.items():
        memory.add_row(name, *map(format_bytes, (each["preconditioner"], each["base"], sum(each.values()))))
    Console().print(summary, memory)


def title(results: dict[str, Any]) -> str:
    """Name the model, the data set, the optimizer, which DeepSpeed's configuration may name, and the seed."""
    options, by_deepspeed = results["options"], results["deepspeed_optimizer"]
    name = f"{by_deepspeed['type']} of DeepSpeed's configuration" if by_deepspeed else options["optimizer"]
    return f"{subject(results)}, {name}, seed {options['seed']}"


def subject(results: dict[str, Any]) -> str:
    """Name the model, and the data set that was read: a folder's name where one was given.

    >>> subject({"options": {"model": "vit-small", "dataset_path": "/data/cifar/", "dataset_name": "uoft-cs/cifar100"}})
    'vit-small on cifar'
    """
    options = results["options"]
    folder = options.get("dataset_path") or options.get("train_dir")
    parts = Path(folder).parts[-2:] if folder else ()
    source = "/".join(parts[-1:] if parts[-1] != "train" else parts) if parts else folder or options["dataset_name"]
    trained = options.get("model_name_or_path")
    return f"{options['model'] or (Path(trained).name if trained else 'model')} on {source}"


def whole_intervals(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out training losses that are means over fewer steps than others, such as a run's last ones.

    >>> [line["step"] for line in whole_intervals([{"step": step, "loss": 1.0} for step in (10, 20, 24)])]
    [10, 20]
    """
    steps = [0, *(line["step"] for line in lines if "loss" in line)]
    lengths = {step: step - before for before, step in itertools.pairwise(steps)}
    longest = max(lengths.values(), default=0)
    return [line for line in lines if "loss" not in line or lengths[line["step"]] == longest]


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and evaluation loss, evaluation accuracy and learning rate over the steps, as a PNG."""
    train = whole_intervals([line for line in lines if "loss" in line])
    evals = [line for line in lines if "eval_loss" in line]
    with picture(path, columns=3) as (figure, (loss, accuracy, rate)):
        _draw(loss, train, "loss", "training", BLUE, marker="")
        _draw(loss, evals, "eval_loss", "evaluation", RED)
        loss.set_title("loss")
        losses = [line["loss"] for line in train] + [line["eval_loss"] for line in evals]
        if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
            loss.set_yscale("log")
            label_logarithms(loss.yaxis)
        loss.legend()
        _draw(accuracy, evals, "eval_accuracy", "", RED)
        accuracy.set_title("evaluation accuracy")
        accuracy.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        _draw(rate, train, "learning_rate", "", GRAY, marker="")
        rate.set_title("learning rate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        for axes in (loss, accuracy, rate):
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
        figure.suptitle(title)


def _draw(axes: Any, lines: list[dict[str, Any]], key: str, label: str, color: str, marker: str = "o") -> None:
    points = [(line["step"], line[key]) for line in lines if line[key] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)


def plot_health(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw orthogonality errors, ranges of eigenvalues and failures of all preconditioned parameters, as a PNG."""
    lines = [line for line in lines if line["health"]]
    steps = [line["step"] for line in lines]

    def over_steps(key: str, choose: Callable[[Iterable[float]], float]) -> list[float]:
        told = [[each[key] for each in line["health"].values() if each[key] is not None] for line in lines]
        return [choose(values) if values else math.nan for values in told]

    with picture(path, columns=3) as (figure, (errors, eigenvalues, failures)):
        errors.plot(steps, over_steps("orthogonality_error", max), "o-", color=RED, label="as stored, worst")
        errors.plot(steps, over_steps("orthogonality_error", statistics.median), "o--", color=RED, label="median")
        errors.plot(steps, over_steps("rectified_error", max), "o-", color=BLUE, label="rectified, worst")
        errors.set(title="distance from orthogonal", ylim=(0, None))
        errors.legend()
        eigenvalues.plot(steps, over_steps("largest_eigenvalue", max), "o-", color=BLUE, label="largest")
        eigenvalues.plot(steps, over_steps("smallest_eigenvalue", min), "o-", color=GRAY, label="smallest")
        eigenvalues.set_yscale("symlog", linthresh=1e-12)
        eigenvalues.set_title("eigenvalues of the statistics")
        eigenvalues.legend()
        failures.plot(steps, over_steps("failures", max), "o-", color=RED)
        failures.set(title="failed updates in a row, worst", ylim=(0, max(1, failures.get_ylim()[1])))
        failures.yaxis.get_major_locator().set_params(integer=True)
        for axes in (errors, eigenvalues, failures):
            axes.set_xlabel("step")
        figure.suptitle(title)
