"""Measure how the cost of Shampoo4's steps grows with the parameters, and with the order of their blocks."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from plots import COLORS, label_logarithms, number_table, picture, write_json
from rich.console import Console
from rich.table import Table

from .blocks import blocks_of, step_flops
from .measure import Row, measure, setting
from .optimizers import ADAMW, shampoo4_with_blocks

# Of steps: their optimizer, label and line.
KINDS = {
    "ordinary": ("shampoo4", "Shampoo4, ordinary", "o-"),
    "refresh": ("shampoo4", "Shampoo4, refresh", "o--"),
    "adamw": ("adamw", "AdamW", "o-"),
}
GRADIENTS = 2  # sets that are replayed


def compare_sizes(flags: argparse.Namespace, console: Console) -> None:
    """Measure every size, print the table, write growth.json and growth.png."""
    about = setting(flags)
    rows = [measure_stack(*sizes, flags) for sizes in itertools.product(flags.parameters, flags.block_sizes)]
    clock = "processor" if flags.device.type == "cpu" else "elapsed"
    title = f"Shampoo4 on stacks like a ViT's; {about['device']}, {clock} time, load before {about['load_before']:.1f}"
    console.print(growth_table(rows, title))
    write_json(flags.output_dir / "growth.json", {**about, "sizes": rows})
    threads = f", {about['threads']} thread{'s' if about['threads'] > 1 else ''}" if clock == "processor" else ""
    title = f"AdamW and Shampoo4 on stacks of matrices like a ViT's; {about['device']}{threads}, {clock} time"
    draw_growth(rows, title, flags.output_dir / "growth.png")
    print(f"wrote {flags.output_dir / 'growth.png'}")


def measure_stack(parameters: float, limit: int, flags: argparse.Namespace) -> Row:
    """Time steps on a stack of about ``parameters`` parameters in blocks of at most ``limit``; count their flops."""
    shapes = stack_shapes(parameters)
    generator = torch.Generator(flags.device).manual_seed(0)
    replayed = [
        [torch.randn(*shape, generator=generator, device=flags.device) for shape in shapes] for _ in range(GRADIENTS)
    ]
    adamw, ours = measure({"adamw": ADAMW, "shampoo4": shampoo4_with_blocks(limit)}, replayed, flags)
    clock = "cpu_ms" if flags.device.type == "cpu" else "wall_ms"
    taken: dict[str, list[float]] = {"ordinary": [], "refresh": []}
    for step, milliseconds in ours["steps"][clock].items():
        taken["refresh" if step % flags.interval == 0 else "ordinary"].append(milliseconds)
    median = {kind: statistics.median(times) for kind, times in taken.items()}
    blocks = blocks_of(shapes, limit)
    flops = step_flops(blocks)
    of_refresh = max(median["refresh"] - median["ordinary"], 1e-6)  # ms beyond an ordinary step
    return {
        "parameters": sum(rows * columns for rows, columns in shapes),
        "block_size": limit,
        "blocks": blocks.total(),
        "milliseconds": {**median, "adamw": adamw[clock]["median"]},
        "flops": flops,
        "gflops_per_second": {
            "ordinary": flops["ordinary"] / median["ordinary"] / 1e6,
            "refresh": flops["refresh"] / of_refresh / 1e6,
        },
        "state_bytes": {"shampoo4": ours["state_bytes"], "adamw": adamw["state_bytes"]},
        "transient_bytes": ours["transient_bytes"],
    }


def stack_shapes(parameters: float) -> list[tuple[int, int]]:
    """List shapes like a ViT's of about ``parameters`` elements, 12 h^2 a layer: four squares, two of an MLP.

    The hidden size h is a multiple of 64, about 64 times the number of layers, as in ViT-S to ViT-L.

    >>> [(shapes[0][0], len(shapes) // 6) for shapes in map(stack_shapes, (1e6, 1e7, 1e8))]
    [(192, 2), (384, 6), (832, 12)]
    """
    hidden = 64 * max(1, round((parameters / 12 / 64**2) ** (1 / 3)))
    layers = max(1, round(parameters / (12 * hidden**2)))
    return layers * [*4 * [(hidden, hidden)], (4 * hidden, hidden), (hidden, 4 * hidden)]


def growth_table(rows: Sequence[Row], title: str) -> Table:
    """Make the table, a line for each size."""
    table = number_table(title, "parameters", (
        "blocks\nat most", "blocks", "ordinary\nms", "\nGFLOP/s", "refresh\nms", "\nGFLOP/s",
        "AdamW\nms", "state\nB/param", "AdamW\nB/param", "transient\nMB", "refresh\nMB",
    ))  # fmt: skip
    for row in rows:
        cells = [f"{row['parameters'] / 1e6:.2f} M", str(row["block_size"]), str(row["blocks"])]
        for kind in ("ordinary", "refresh"):
            cells += [f"{row['milliseconds'][kind]:.1f}", f"{row['gflops_per_second'][kind]:.1f}"]
        cells.append(f"{row['milliseconds']['adamw']:.1f}")
        cells += [f"{held / row['parameters']:.2f}" for held in row["state_bytes"].values()]
        table.add_row(*cells, *(f"{size / 1e6:.0f}" for size in row["transient_bytes"].values()))
    return table


def draw_growth(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw seconds of each kind of step and bytes of state against parameters, for the first block size."""
    rows = sorted(
        (row for row in rows if row["block_size"] == rows[0]["block_size"]), key=lambda row: row["parameters"]
    )
    sizes = [row["parameters"] for row in rows]

    def line(axes: Any, values: Sequence[float], name: str, label: str, style: str = "o-") -> None:
        axes.plot(sizes, values, style, color=COLORS[name], label=label)

    with picture(path, 1, 2, (11, 4.2)) as (figure, (times, states)):
        for kind, (name, label, style) in KINDS.items():
            line(times, [row["milliseconds"][kind] / 1e3 for row in rows], name, label, style)
        line(states, [row["state_bytes"]["shampoo4"] / 1e6 for row in rows], "shampoo4", "Shampoo4")
        line(states, [row["state_bytes"]["adamw"] / 1e6 for row in rows], "adamw", "AdamW")
        times.set_title("seconds of a step")
        states.set_title("MB of optimizer state")
        for axes in (times, states):
            axes.set(xscale="log", yscale="log", xlabel="parameters")
            label_logarithms(axes.yaxis)
            axes.legend()
        figure.suptitle(title)
