"""Colors of launch/plots.py: one for each optimizer, the same in every picture."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from matplotlib.colors import to_rgb
from support import launching  # noqa: F401  finds launch/
from support.drawn import Drawn

# isort: split
import plots
from bench import growth, modes
from bench.optimizers import CHOICES
from rivals import contest
from rivals.optimizers import RIVALS
from rivals.tasks import TASKS
from vit.optim import OPTIMIZERS


def test_every_optimizer_has_a_color_of_its_own() -> None:
    assert {*CHOICES, *RIVALS, *OPTIMIZERS} <= plots.COLORS.keys()
    assert plots.COLORS["shampoo4-32bit"] == plots.COLORS["shampoo32"]
    own = [color for name, color in plots.COLORS.items() if name != "shampoo4-32bit"]
    every = [to_rgb(color) for color in (*own, *plots.VARIANTS)]
    for one, other in itertools.combinations(every, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.05, (one, other)


def test_the_fair_comparison_names_curves_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch, contest)
    result = {"losses": [2.0, 1.5, 1.0] * 40, "state bytes": 8, "parameters": 1}
    names = ("adamw", "muon", "soap-5", "shampoo4")
    contest.draw({"vit": {name: (1e-3, [result]) for name in names}}, [0, 2], tmp_path / "x.png")
    curves, bars = drawn.figure.axes
    assert [line.get_color() for line in curves.get_lines()] == [plots.COLORS[name] for name in names]
    assert [to_rgb(bar.get_facecolor()) for bar in bars.patches] == [to_rgb(plots.COLORS[name]) for name in names]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [RIVALS[name].label for name in names]
    assert TASKS["vit"].title.split(",")[0] in curves.get_title()
    assert drawn.figure.get_suptitle() == "mean of seeds 0, 2"


def test_the_benchmark_colors_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch, modes)
    names, clock = ("adamw", "shampoo4", "soap"), {"median": 1.0, "worst": 2.0}
    rows = [{"name": name, "label": name, "cpu_ms": clock, "state_bytes_per_parameter": 8.0} for name in names]
    about = {"clock": "cpu_ms", "parameters": 1e6, "interval": 10, "device": "cpu", "threads": 1}
    modes.draw(rows, about, tmp_path / "x.png")
    bars = drawn.figure.axes[1].patches
    assert [to_rgb(bar.get_facecolor()) for bar in bars] == [to_rgb(plots.COLORS[name]) for name in names]


def test_growth_names_models_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch, growth)
    row: dict[str, Any] = {"parameters": 1e6, "block_size": 256, "state_bytes": {"shampoo4": 4e6, "adamw": 8e6}}
    row["milliseconds"] = {"ordinary": 2.0, "refresh": 9.0, "adamw": 1.0}
    monkeypatch.setattr(growth, "measure_stack", lambda *_: row)
    monkeypatch.setattr(growth, "setting", lambda _: {"device": "cpu", "threads": 2, "load_before": 0.0})
    monkeypatch.setattr(growth, "growth_table", lambda *_: "")
    flags: Any = argparse.Namespace(parameters=[1e6], block_sizes=[256], output_dir=tmp_path)
    flags.device = argparse.Namespace(type="cpu")
    growth.compare_sizes(flags, argparse.Namespace(print=print))
    title = drawn.figure.get_suptitle()
    assert "stacks of matrices like a ViT's" in title and "2 threads" in title
    ours, theirs = plots.COLORS["shampoo4"], plots.COLORS["adamw"]
    assert [line.get_color() for line in drawn.figure.axes[0].get_lines()] == [ours, ours, theirs]
