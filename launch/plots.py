"""Parts that the reports of this folder share: pictures in one style, tables, bytes in words, JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

RED, BLUE, GRAY = "#c8452d", "#2a6fbb", "#5f6b76"
# The color of an optimizer in every picture, by its name in flags: ours red, Shampoos green, SOAPs orange, AdamWs gray.
COLORS = {
    "adamw": GRAY,
    "bitsandbytes-adamw8bit": "#8b959e",
    "torchao-adamw8bit": "#a9b2ba",
    "torchao-adamw4bit": "#c4cbd1",
    "sgd": "#9e6b3a",
    "muon": BLUE,
    "soap": "#e08a1e",
    "soap-5": "#f3c27a",
    "heavyball-soap": "#b5761f",
    "shampoo4": RED,
    "shampoo4-compact": "#8e2f62",
    "shampoo4-staggered": "#e58a78",
    "shampoo4-muon": "#d9608f",
    "shampoo4-paper": "#3a9e6f",
    "shampoo32": "#1c5a3d",
    "shampoo4-naive": "#9fcf9a",
    "shampoo4-implicit": "#6db58f",
    "shampoo": "#6b7a1f",
    "scalable-shampoo": "#97a63f",
    "meta-shampoo": "#3f5b1a",
}
COLORS["shampoo4-32bit"] = COLORS["shampoo32"]  # benchmark.py's name for it
# Of variants without a color of their own.
VARIANTS = ("#7a5195", "#1f8a9e", "#c9a227", "#4f6fd0", "#b58fd0", "#69c3d6", "#7d5a4f", "#222222")

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.titleweight": "bold",
    "savefig.dpi": 120,
}


@contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (14.0, 4.2), **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Draw a PNG in the style of all pictures here.

    Args:
        path: the file, written when the block ends.
        rows: of axes.
        columns: of axes.
        size: width and height in inches.
        **options: of ``matplotlib.pyplot.subplots``.

    Yields:
        The figure, and its axes as ``subplots`` gives them.
    """
    import matplotlib  # takes a while, and many runs draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **options)
        try:
            yield figure, axes
            figure.savefig(path)
        finally:
            pyplot.close(figure)


def format_bytes(count: float) -> str:
    """Format a count of bytes, in powers of 1000, such as 1.25 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.{2 if power else 0}f} {units[power]}"


def told_seeds(seeds: Sequence[int], of: str = "mean") -> str:
    """Say in a title what the curves are: one seed's, or what they show ``of`` several.

    >>> told_seeds([2]), told_seeds([0, 1])
    ('seed 2', 'mean of seeds 0, 1')
    """
    listed = ", ".join(map(str, dict.fromkeys(seeds)))
    return f"{of} of seeds {listed}" if "," in listed else f"seed {listed}"


def label_logarithms(axis: Any) -> None:
    """Label a logarithmic ``axis``, such as ``panel.yaxis``, once everything is drawn.

    Over two powers of ten the labels are powers of ten, over one of them also 2 and 5 between. Over less they are as
    on a linear axis.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    between = "25" if high / low < 100 else ""
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in between else "")
    axis.grid(which="both")


def number_table(title: str, first: str, columns: Iterable[str], width: int | None = None) -> Table:
    """Make a table with a column ``first`` of names, at least ``width`` characters wide, and columns of numbers."""
    found = Table(title=title, title_justify="left")
    found.add_column(first, min_width=width)
    for column in columns:
        found.add_column(column, justify="right")
    return found


def make_folder(path: Path) -> None:
    """Make a folder for results, unless it is there.

    Raises:
        SystemExit: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: the folder {path} cannot be made: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and print where it is."""
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
