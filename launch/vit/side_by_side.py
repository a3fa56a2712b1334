"""Finished runs side by side: what they are called, a table, and a picture."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots import COLORS, VARIANTS, format_bytes, label_logarithms, number_table, picture, told_seeds
from rich.console import Console
from vit.optim import OPTIMIZERS
from vit.report import read_lines, subject, whole_intervals

# How tables say that an option differs from its default; the first four are part of the preset "shampoo-compact".
_WORDS: dict[tuple[str, Any], str] = {
    ("codebook", "normal"): "normal levels",
    ("root", "implicit"): "implicit roots",
    ("scale_dtype", "bfloat16"): "bfloat16 scales",
    ("rectify_steps", (1, 1)): "",
    ("quantize", "preconditioner"): "naive",
    ("codebook", "dynamic_tree"): "dynamic tree",
    ("rectify_steps", (0, 0)): "not rectified",
    ("refresh_iterations", 2): "2 QR steps",
    ("refresh", "staggered"): "staggered",
    ("matmul_dtype", "bfloat16"): "bfloat16 products",
}

# What decides on the bytes of method="soap".
_SOAP = {(8, "bfloat16", "bfloat16"): "Shampoo4", (4, "int8", "factored"): "Shampoo4, compact"}

# Keys of ``COLORS`` by label. Other labels take the colors of ``VARIANTS``.
_COLORED = {
    "AdamW": "adamw",
    "SGD": "sgd",
    "32-bit Shampoo": "shampoo32",
    "4-bit Shampoo": "shampoo4-paper",
    "4-bit Shampoo, naive": "shampoo4-naive",
    "4-bit Shampoo, implicit roots": "shampoo4-implicit",
    "Shampoo4": "shampoo4",
    "Shampoo4, compact": "shampoo4-compact",
}

_LINES = ("-", "--", ":")  # of the first run, the second and the third with a color
_PALE = 0.4  # opacity of the part of a bar that is the base optimizer's

Runs = dict[str, dict[int, dict[str, Any]]]  # label -> seed -> results


def label_of(results: dict[str, Any]) -> str:
    """Name a run's optimizer as tables do, by its options."""
    name, by_deepspeed = results["options"]["optimizer"], results.get("deepspeed_optimizer")
    if by_deepspeed:
        return f"{by_deepspeed['type']} of a DeepSpeed configuration"
    if not name.startswith("shampoo4"):
        return {"adamw": "AdamW", "shampoo32": "32-bit Shampoo", "sgd": "SGD"}[name]
    # Older runs have all options in one place.
    options = {**results["options"], **OPTIMIZERS.get(name, {}), **results.get("optimizer_options", {})}
    if options.get("method") == "soap":
        kinds = options["bits"], options["momentum_dtype"], options["second_moment_dtype"]
        moments = " and ".join(sorted(set(kinds[1:])))
        return _SOAP.get(kinds, f"Shampoo4, {kinds[0]} bits, {moments} moments")
    own = [(key, tuple(value) if isinstance(value, list) else value) for key, value in options.items()]
    found = [place for place in _WORDS if place in own]
    preset = list(_WORDS)[:4]
    words = [_WORDS[place] for place in found]
    if found[:4] == preset:
        words[:4] = ["compact"]
    return ", ".join([f"{options['bits']}-bit Shampoo", *filter(None, words)])


def kept_share(runs: Runs, label: str) -> float | None:
    """Return the share of 32-bit Shampoo's gain over AdamW that ``label`` has, by mean training losses, if any."""
    needed = ("AdamW", "32-bit Shampoo", label)
    seeds = set.intersection(*(set(runs.get(name, {})) for name in needed))
    if not seeds:
        return None
    adamw, full, own = (statistics.mean(runs[name][seed]["train_loss"] for seed in seeds) for name in needed)
    return (adamw - own) / (adamw - full) if adamw - full > 0.01 * adamw else None


def print_table(runs: Runs) -> None:
    """Print one line for each optimizer, with values of several seeds in the seeds' order."""
    kept = {label: kept_share(runs, label) for label in runs}
    several = any(map(is_distributed, _all(runs)))
    whose = ("state of a\nprocess", "of all\nprocesses") if several else ("all state",)
    gain = ("kept",) if any(share is not None for share in kept.values()) else ()
    columns = ("seeds", "training loss", "accuracy", *gain, "preconditioner", *whose, "bytes per\nparameter", "seconds")
    table = number_table("", "optimizer", columns)
    for label, seeds in runs.items():
        results = list(seeds.values())
        largest, every, each = state_sizes(results[0])
        table.add_row(
            label,
            ", ".join(map(str, seeds)),
            " / ".join(f"{run['train_loss']:.4f}" for run in results),
            " / ".join(f"{run['eval_accuracy']:.4f}" for run in results),
            *([] if not gain else [""] if kept[label] is None else [f"{kept[label]:.2f}"]),
            format_bytes(results[0]["state_bytes"]["preconditioner"]),
            *[format_bytes(largest), format_bytes(every)][: len(whose)],
            "" if each is None else f"{each:.2f}",
            f"{statistics.mean(run['total_seconds'] for run in results):.0f}",
        )
    console = Console(width=170)
    console.print(table)
    if several:
        console.print("Preconditioner: of the process that keeps most. Bytes per parameter: of all processes.")


def is_distributed(run: dict[str, Any]) -> bool:
    """Tell whether a run had several processes."""
    return len(run.get("state_bytes_per_process", ())) > 1


def state_sizes(run: dict[str, Any]) -> tuple[int, int, float | None]:
    """Return the bytes of state of the process that keeps most, of all, and these for each parameter, if known."""
    largest = sum(run["state_bytes"].values())
    every = sum(sum(held.values()) for held in run.get("state_bytes_per_process", [run["state_bytes"]]))
    return largest, every, every / run["parameters"] if "parameters" in run else None


def _all(runs: Runs) -> list[dict[str, Any]]:
    return [run for seeds in runs.values() for run in seeds.values()]


def draw(runs: Runs, path: Path) -> None:
    """Draw training loss by step and by time, accuracy by epoch (means over seeds, in bands), and state bytes."""
    with picture(path, 2, 2, size=(13, 8.5)) as (figure, panels):
        by_step, by_time, by_epoch, bars = panels.flat
        colors = colors_of(runs)
        for number, (color, (label, seeds)) in enumerate(zip(colors, runs.items(), strict=True)):
            style = _LINES[colors[:number].count(color) % len(_LINES)]
            logs = [whole_intervals(read_lines(run["folder"] / "metrics.jsonl")) for run in seeds.values()]
            steps, losses = _together(logs, "step", "loss")
            if not steps:
                print(f"{label}: the logs have no step in common, so no training loss is drawn")
            seconds = statistics.mean(run["total_seconds"] / run["steps"] for run in seeds.values())
            _band(by_step, steps, losses, color, style, label)
            _band(by_time, [step * seconds for step in steps], losses, color, style, label)
            _band(by_epoch, *_together(logs, "epoch", "eval_accuracy"), color, style, label)
        for panel, name in ((by_step, "step"), (by_time, "seconds, all things included")):
            panel.set(xlabel=name, ylabel="training loss", xlim=(0, None), yscale="log")
            label_logarithms(panel.yaxis)
        by_epoch.set(xlabel="epoch", ylabel="accuracy on the evaluation images", xlim=(0, None))
        by_step.legend(fontsize=9)

        _draw_states(bars, runs, colors)
        figure.suptitle(heading(runs))


def _draw_states(bars: Any, runs: Runs, colors: Sequence[str]) -> None:
    """Draw a bar for each optimizer, its base's part pale unless that is all."""
    held = {label: next(iter(seeds.values()))["state_bytes"] for label, seeds in runs.items()}
    base, own = ([value[key] / 1e6 for value in held.values()] for key in ("base", "preconditioner"))
    labels = [textwrap.fill(label, 18) for label in held]
    for name, left, right, color in zip(labels, base, own, colors, strict=True):
        bars.barh(name, left, color=color, alpha=_PALE if right else 1)
        bars.barh(name, right, left=left, color=color)
    bars.invert_yaxis()
    bars.grid(visible=False)
    whose = " of a process" if any(map(is_distributed, _all(runs))) else ""
    mixed = any(left and right for left, right in zip(base, own, strict=True))
    bars.set(xlabel=f"MB of optimizer state{whose}{'; pale: of its base' if mixed else ''}")


def colors_of(runs: Runs) -> list[str]:
    """Choose a color for each label: its own if it has one, whatever stands beside it."""
    left = itertools.cycle(VARIANTS)
    names = [next(iter(seeds.values()))["name"] for seeds in runs.values()]
    return [COLORS[_COLORED[name]] if name in _COLORED else next(left) for name in names]


def heading(runs: Runs) -> str:
    """Name data set, model and seeds of all runs."""
    subjects = list(dict.fromkeys(map(subject, _all(runs))))
    seeds = sorted({seed for seeds in runs.values() for seed in seeds})
    return f"{'; '.join(subjects)} ({told_seeds(seeds, 'mean and range')})"


def _together(logs: Sequence[list[dict[str, Any]]], key: str, value: str) -> tuple[list[float], list[list[float]]]:
    """Find where all logs have ``value``, and its values there; nothing if they have no place in common."""
    series = [{line[key]: line[value] for line in log if line.get(value) is not None} for log in logs]
    places = sorted(set.intersection(*map(set, series)))
    return places, [[one[place] for one in series] for place in places]


def _band(
    panel: Any, places: Sequence[float], values: Sequence[Sequence[float]], color: str, style: str, label: str
) -> None:
    marker = "" if len(places) > 1 else "o"
    panel.plot(places, [statistics.mean(v) for v in values], style, color=color, label=label, marker=marker)
    panel.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
