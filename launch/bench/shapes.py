"""Compute what factors cost for the parameters of large models, from their shapes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from memory.models import Shapes, adapters_of, parameter_count, shapes_of, title
from plots import number_table, write_json
from rich.console import Console

from sharded_shampoo4.numerics.matrix import Matrix
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.presets import apply_preset

from .blocks import blocks_of, step_flops
from .measure import Row

MODELS = ("mixtral-8x7b", "qwen3moe-30b", "gptoss-20b", "llama-8b", "llama-7b", "vit-22b", "mamba-2.8b")
ADAPTED, RANK = "llama-7b", 16  # the model that has adapters, and their rank
FORMER: dict[str, Any] = {"max_aspect": 0, "batch_dims": 0}  # one matrix for each parameter, with factors of both sides
SETTINGS: dict[str, dict[str, Any]] = {"compact": {"preset": "compact"}, "shampoo": {"method": "shampoo"}}


def compare_shapes(flags: argparse.Namespace, console: Console) -> None:
    """Print a table of all models, write shapes.json."""
    rows = []
    for name in flags.models:
        print(f"looking at {title(name)}", flush=True)
        rows.append(weigh(title(name), shapes_of(name)))
        if name == ADAPTED:
            rows.append(weigh(f"LoRA {RANK} of {title(name)}", adapters_of(name, RANK)))
    table = number_table(
        "Factors, each parameter one matrix > as they are",
        "model",
        ("parameters", "blocks", "refresh, Tflop", "compact, B/param", "shampoo, B/param"),
    )
    for row in rows:
        pairs = (row[name] for name in ("blocks", "refresh", *SETTINGS))
        table.add_row(row["model"], f"{row['parameters']:,}", *map(_both, pairs))
    console.print(table)
    write_json(flags.output_dir / "shapes.json", {"models": rows})


def weigh(name: str, shapes: Shapes) -> Row:
    """Compute blocks, refresh and bytes of factors, as they were with one matrix for each parameter and as they are."""
    blocks = [blocks_of(shapes.values(), **options) for options in (FORMER, {})]
    flops = [step_flops(found, "shampoo")["refresh"] / 1e12 for found in blocks]
    sizes = {
        setting: [_bytes_per_parameter(shapes, {**options, **former}) for former in (FORMER, {})]
        for setting, options in SETTINGS.items()
    }
    return {
        "model": name,
        "parameters": parameter_count(shapes),
        "blocks": [found.total() for found in blocks],
        "refresh": flops,
        **sizes,
    }


def _bytes_per_parameter(shapes: Shapes, given: Mapping[str, Any]) -> float:
    options, device = PreconditionerOptions(**apply_preset(given)), torch.device("meta")
    matrices = [Matrix.of(name, shape, options, device) for name, shape in shapes.items()]
    return sum(matrix.factor_bytes for matrix in matrices if matrix is not None) / parameter_count(shapes)


def _both(pair: list[float]) -> str:
    return " > ".join(map(_number, pair))


def _number(value: float) -> str:
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
