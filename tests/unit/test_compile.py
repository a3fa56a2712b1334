"""compile=True: the same numbers, and nothing is compiled once training has warmed up."""

from __future__ import annotations

import pytest
import torch
from support.directions import Directions, replayed
from support.marks import needs_compiler
from torch._dynamo.utils import counters

SHAPES = [(64, 64), (65, 48), (130, 96), (130, 96)]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"bits": 3, "root": "implicit", "scale_dtype": "bfloat16"}], ids=str)
def test_compiled_steps_are_the_same_and_compile_once(options: dict[str, object]) -> None:
    options = {"statistics_interval": 2, "root_interval": 4, "min_quant_numel": 0, "refresh": "staggered", **options}
    plain, compiled = Directions(SHAPES, **options), Directions(SHAPES, compile=True, **options)
    graphs = []
    for gradients in replayed(SHAPES, 16):
        assert all(map(torch.equal, plain.step(gradients), compiled.step(gradients)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[7] == graphs[-1], graphs
