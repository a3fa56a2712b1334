"""Compare Shampoo4's modes and other optimizers in one process."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots import BLUE, RED, picture, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .blocks import blocks_of
from .measure import Row, gradients_of_a_vit, measure, number_table, setting
from .optimizers import CHOICES, OURS, PRODUCTS, is_ordinary


def compare_modes(flags: argparse.Namespace, console: Console) -> None:
    """Measure all optimizers that were asked for, print the table, write the files."""
    about = setting(flags)
    names = [name for name in CHOICES if name == "adamw" or name in flags.only]
    absent = {name: reason for name in names if (reason := CHOICES[name].why_missing())}
    replayed = gradients_of_a_vit(flags)
    choices = {"products": PRODUCTS, **{name: CHOICES[name] for name in names if name not in absent}}
    found = {row["name"]: row for row in measure(choices, replayed, flags)}
    for name, reason in absent.items():
        choice = CHOICES[name]
        found[name] = {"name": name, "label": choice.label, "missing": reason, "install": choice.install}
    rows = [found[name] for name in ("products", *names)]
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


def add_floors(rows: list[Row], clock: str, interval: int) -> float:
    """Give each row of ours the median of its ordinary steps and that over the floor; milliseconds of the floor."""
    floor: float = sum(row[clock]["median"] for row in rows if row["name"] in ("products", "adamw"))
    for row in rows:
        if row["name"] in OURS:
            taken = [ms for step, ms in row["steps"][clock].items() if is_ordinary(row["name"], step, interval)]
            if taken:
                row["ordinary_ms"] = statistics.median(taken)
                row["over_floor"] = row["ordinary_ms"] / floor
    return floor


def modes_table(rows: list[Row], about: dict[str, Any]) -> Table:
    """A line for each optimizer; those without numbers say why."""
    title = (
        f"ViT, hidden {about['hidden_size']}, {about['num_hidden_layers']} layers, {about['parameters']:,} "
        f"parameters; refresh every {about['interval']} steps, {about['steps']} steps; {about['device']}, "
        f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}, load before {about['load_before']:.1f}"
    )
    found = number_table(title, 40, (
        "graph", "CPU ms\nmedian", "\nworst", "wall ms\nmedian", "\nworst", "worst /\nmedian", "state\nB/param",
        "transient\nMB", "refresh\nMB", "ordinary\n/ floor",
    ))  # fmt: skip
    for row in rows:
        if "cpu_ms" not in row:
            reason = row.get("error") or row["missing"]
            found.add_row(f"{row['label']}: [red]{escape(reason)}[/red]")
            continue
        times = [f"{row[which][kind]:.2f}" for which in ("cpu_ms", "wall_ms") for kind in ("median", "worst")]
        ratio = row[about["clock"]]["worst"] / row[about["clock"]]["median"]
        kept = f"{row['state_bytes_per_parameter']:.2f}" if row["name"] != "products" else ""
        transient = [f"{size / 1e6:.2f}" for size in row["transient_bytes"].values()]
        over = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        found.add_row(row["label"], row["graph"], *times, f"{ratio:.1f}", kept, *transient, over)
    return found


def tell(rows: list[Row], about: dict[str, Any], console: Console) -> None:
    """What the table has no column for."""
    unit = "CPU" if about["clock"] == "cpu_ms" else "elapsed"
    of_what = f"the products of {about['blocks']} blocks, and AdamW"
    console.print(f"Floor of an ordinary step of ours, {of_what}: {about['floor_ms']:.2f} {unit} ms.")
    if about["steps"] < about["interval"]:
        console.print("[red]These steps are less than an interval: no worst step holds a refresh.[/red]")
    for row in rows:
        if "missing" in row:
            console.print(f"Missing: {row['name']}. {escape(row['missing'])}. {escape(row['install'])}", soft_wrap=True)


def draw(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """State bytes against the median step, a whisker to the worst; names in a column at the right."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in rows if "cpu_ms" in row and row["name"] != "products"]
    with picture(path, size=(11, 6.5)) as (_, axes):
        axes.set(xscale="log", yscale="log")
        for row in shown:
            times, kept, color = row[about["clock"]], row["state_bytes_per_parameter"], _color(row)
            whisker = [[0.0], [times["worst"] - times["median"]]]
            axes.errorbar(times["median"], kept, xerr=whisker, fmt="o", color=color, capsize=3, elinewidth=1)
        axes.margins(0.08)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{'CPU' if about['clock'] == 'cpu_ms' else 'elapsed'} ms of a step: median, and to the worst")
        axes.set_ylabel("bytes of optimizer state per parameter")
        axes.set_title(f"{about['parameters'] / 1e6:.2f} M parameters, refresh every {about['interval']} steps")
        axes.autoscale_view()
        _name_points(axes, shown, about["clock"])


def _color(row: Row) -> str:
    return RED if row["name"] in OURS else BLUE


def _name_points(axes: Any, rows: list[Row], clock: str) -> None:
    """Names beside the axes at the heights of their points, or near them; lines lead from the whiskers' ends."""
    ends = [(row[clock]["worst"], row["state_bytes_per_parameter"]) for row in rows]
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted(zip(to_axes.transform(ends).tolist(), ends, rows, strict=True), key=lambda each: each[0][::-1])
    heights = spread([height for (_, height), _, _ in placed], gap=0.042)
    for height, (_, end, row) in zip(heights, placed, strict=True):
        line = {"arrowstyle": "-", "color": "#b9c2cb", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
        axes.annotate(
            row["label"], end, (1.03, height), xycoords="data", textcoords="axes fraction", va="center",
            color=_color(row), arrowprops=line,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising ``heights``, moved up where they are closer than ``gap``, and down again where they would exceed 1.

    >>> spread([0.2, 0.2, 0.9, 1.0], gap=0.25)
    [0.2, 0.45, 0.75, 1.0]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
