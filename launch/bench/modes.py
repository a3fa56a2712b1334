"""Compare Shampoo4's modes and other optimizers in one process."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from plots import COLORS, label_logarithms, number_table, picture, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .blocks import blocks_of
from .measure import Row, gradients_of_a_vit, measure, setting
from .optimizers import CHOICES, FLOORS, OURS, is_ordinary


def compare_modes(flags: argparse.Namespace, console: Console) -> None:
    """Measure all optimizers that were asked for, print the table, write the files."""
    about = setting(flags)
    names = [name for name in CHOICES if name == "adamw" or name in flags.only]
    absent = {name: reason for name in names if (reason := CHOICES[name].why_missing())}
    replayed = gradients_of_a_vit(flags)
    choices = {**FLOORS, **{name: CHOICES[name] for name in names if name not in absent}}
    found = {row["name"]: row for row in measure(choices, replayed, flags)}
    for name, reason in absent.items():
        choice = CHOICES[name]
        found[name] = {"name": name, "label": choice.label, "missing": reason, "install": choice.install}
    rows = [found[name] for name in (*FLOORS, *names)]
    clock = "cpu_ms" if flags.device.type == "cpu" else "wall_ms"
    about |= {
        "parameters": sum(gradient.numel() for gradient in replayed[0]),
        "blocks": blocks_of(gradient.shape for gradient in replayed[0]).total(),
        "clock": clock,
        "floor_ms": add_floors(rows, clock, flags.interval),
    }
    console.print(modes_table(rows, about))
    tell(rows, about, console)
    write_json(flags.output_dir / "benchmark.json", {**about, "optimizers": rows})
    draw(rows, about, flags.output_dir / "benchmark.png")
    print(f"wrote {flags.output_dir / 'benchmark.png'}")


def add_floors(rows: list[Row], clock: str, interval: int) -> dict[str, float]:
    """Add to our rows the median of their ordinary steps, and its ratio to their floor. Return the floors, in ms."""
    median = {row["name"]: row[clock]["median"] for row in rows if clock in row}
    floors: dict[str, float] = {name: median[name] + median["adamw"] for name in FLOORS}
    for row in rows:
        if row["name"] in OURS:
            taken = [ms for step, ms in row["steps"][clock].items() if is_ordinary(row["name"], step, interval)]
            if taken:
                row["ordinary_ms"] = statistics.median(taken)
                row["over_floor"] = row["ordinary_ms"] / floors[OURS[row["name"]].floor]
    return floors


def modes_table(rows: list[Row], about: dict[str, Any]) -> Table:
    """Make the table, a line for each optimizer. Those without numbers say why."""
    title = (
        f"ViT, hidden {about['hidden_size']}, {about['num_hidden_layers']} layers, {about['parameters']:,} "
        f"parameters; refresh every {about['interval']} steps, {about['steps']} steps; {about['device']}, "
        f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}, load before {about['load_before']:.1f}"
    )
    found = number_table(title, "optimizer", (
        "graph", "CPU ms\nmedian", "\nworst", "wall ms\nmedian", "\nworst", "worst /\nmedian", "state\nB/param",
        "transient\nMB", "refresh\nMB", "ordinary\n/ floor",
    ), width=40)  # fmt: skip
    for row in rows:
        if "cpu_ms" not in row:
            reason = row.get("error") or row["missing"]
            found.add_row(f"{row['label']}: [red]{escape(reason)}[/red]")
            continue
        times = [f"{row[which][kind]:.2f}" for which in ("cpu_ms", "wall_ms") for kind in ("median", "worst")]
        ratio = row[about["clock"]]["worst"] / row[about["clock"]]["median"]
        kept = f"{row['state_bytes_per_parameter']:.2f}" if row["name"] not in FLOORS else ""
        transient = [f"{size / 1e6:.2f}" for size in row["transient_bytes"].values()]
        over = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        found.add_row(row["label"], row["graph"], *times, f"{ratio:.1f}", kept, *transient, over)
    return found


def tell(rows: list[Row], about: dict[str, Any], console: Console) -> None:
    """Print the floor of a step, and the optimizers that are missing."""
    unit = "CPU" if about["clock"] == "cpu_ms" else "elapsed"
    for name, floor in about["floor_ms"].items():
        console.print(f"Floor of an ordinary step of ours, {FLOORS[name].label} and AdamW: {floor:.2f} {unit} ms.")
    if about["steps"] < about["interval"]:
        console.print("[red]These steps are less than an interval: no worst step holds a refresh.[/red]")
    for row in rows:
        if "missing" in row:
            console.print(f"Missing: {row['name']}. {escape(row['missing'])}. {escape(row['install'])}", soft_wrap=True)


def draw(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """Draw each optimizer's step times, median and worst, beside the bytes of its state."""
    shown = [row for row in rows if "cpu_ms" in row and row["name"] not in FLOORS]
    names, clock = [row["label"] for row in shown], about["clock"]
    medians, worst = ([row[clock][kind] for row in shown] for kind in ("median", "worst"))
    colors = [COLORS.get(row["name"], "black") for row in shown]
    with picture(path, 1, 2, (13, 1.2 + 0.3 * len(shown)), sharey=True) as (figure, (times, states)):
        times.hlines(names, medians, worst, colors)
        times.scatter(medians, names, color=colors)
        times.set(xscale="log", xlabel=f"{'CPU' if clock == 'cpu_ms' else 'elapsed'} ms of a step, median to worst")
        times.invert_yaxis()
        label_logarithms(times.xaxis)
        states.barh(names, [row["state_bytes_per_parameter"] for row in shown], color=colors)
        states.set_xlabel("bytes of optimizer state per parameter")
        threads = f", {about['threads']} thread{'s' if about['threads'] > 1 else ''}" if clock == "cpu_ms" else ""
        size = f"ViT of {about['parameters'] / 1e6:.2f} M parameters"
        figure.suptitle(f"{size}, refresh every {about['interval']} steps; {about['device']}{threads}")
