"""launch/benchmark.py shapes: figures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launching import LAUNCH
from torch import Size

# isort: split
import benchmark  # found through launching
from bench.shapes import MODELS, weigh
from memory.models import adapters_of, parameter_count, shapes_of

assert Path(benchmark.__file__).parent == LAUNCH


def test_figures_by_hand() -> None:
    row = weigh("experts", {"experts": Size([8, 2048, 1024]), "adapter": Size([16, 4096])})
    assert row["parameters"] == 8 * 2048 * 1024 + 16 * 4096
    assert row["blocks"] == [2048 + 4, 16 + 1], "as (8, 2048 * 1024): blocks of 8 x 1024"
    of_square = 2 * 2 * 1024**3 + (4 + 4 + 8 / 3 + 2 + 2) * 2 * 1024**3
    of_adapter = 2 * 16 * 4096 * 16 + 11 * 16**3
    assert row["refresh"][1] == pytest.approx((16 * of_square + of_adapter) / 1e12)
    assert row["shampoo"][0] > 100 and row["shampoo"][1] < 2.3 and row["compact"][1] < 1.2


def test_sizes_are_those_of_the_published_models() -> None:
    counts = {name: parameter_count(shapes_of(name)) / 1e9 for name in MODELS}
    assert counts == pytest.approx(
        {
            "mixtral-8x7b": 46.7, "qwen3moe-30b": 30.5, "gptoss-20b": 20.9, "llama-8b": 8.03, "llama-7b": 6.74,
            "vit-22b": 21.8, "mamba-2.8b": 2.77,
        },
        rel=0.01,
    )  # fmt: skip
    assert parameter_count(adapters_of("llama-7b", 16)) == 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["shapes", "--models", "vit-small", "--output_dir", str(tmp_path)])
    (row,) = json.loads((tmp_path / "shapes.json").read_text())["models"]
    assert f"{row['parameters']:,}" in capsys.readouterr().out
