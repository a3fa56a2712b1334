"""Parts that the reports of this folder share: pictures in one style, tables, bytes in words, JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

RED, BLUE, GRAY = "#c8452d", "#2a6fbb", "#5f6b76"  # RED is for this project's own optimizer where others are beside it
ORANGE = "#d9a441"
LIGHT_GRAY = "#b9c2cb"  # of bars that are context
SERIES = (GRAY, BLUE, RED, ORANGE, "#7a5195", "#3a9e6f", "#b0547f", "#6b7a1f", "#1f8a9e", "#9e6b3a")

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


def label_logarithms(panel: Any) -> None:
    """Label a logarithmic y axis, once everything is drawn.

    Over two powers of ten the labels are powers of ten, over one of them also 2 and 5 between. Over less they are as
    on a linear axis.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = panel.get_ylim()
    between = "25" if high / low < 100 else ""
    if high / low < 10:
        panel.yaxis.set_major_locator(MaxNLocator(6))
        panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in between else "")
    panel.grid(which="both")


def number_table(title: str, first: str, columns: Iterable[str], width: int | None = None) -> Table:
    """Make a table with a column ``first`` of names, at least ``width`` characters wide, and columns of numbers."""
    found = Table(title=title, title_justify="left")
    found.add_column(first, min_width=width)
    for column in columns:
        found.add_column(column, justify="right")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and print where it is."""
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
