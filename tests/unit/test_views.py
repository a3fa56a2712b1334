"""How parameters are seen as matrices: stacks, fused projections, thin matrices, convolutions, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.directions import replayed
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.numerics.matrix import Matrix
from sharded_shampoo4.options import METHODS, PreconditionerOptions
from sharded_shampoo4.presets import PRESETS, apply_preset

COMPACT = PreconditionerOptions(**apply_preset({"preset": "compact"}))
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "soap": {"statistics_interval": 2, "max_preconditioner_dim": 32},
    "compact": {"preset": "compact", "statistics_interval": 2, "max_preconditioner_dim": 32, "min_quant_numel": 0},
    "shampoo": {"method": "shampoo", "statistics_interval": 2, "root_interval": 3, "max_preconditioner_dim": 32},
    "shampoo, grafted by block": {
        "method": "shampoo", "statistics_interval": 2, "root_interval": 3, "grafting": "block",
    },
}  # fmt: skip


def trained(parameters: list[Tensor], gradients: list[list[Tensor]], **options: Any) -> list[Tensor]:
    """What the parameters are after steps with these gradients; parameters and gradients are copied."""
    own = [nn.Parameter(parameter.clone()) for parameter in parameters]
    optimizer = Shampoo4([(f"w{n}", parameter) for n, parameter in enumerate(own)], lr=1e-2, **options)
    for step in gradients:
        for parameter, gradient in zip(own, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in own]


# Shapes, options, and the rows of each matrix as a parameter of its own.
SEVERAL: dict[str, tuple[tuple[int, ...], dict[str, Any], list[int]]] = {
    "experts": ((3, 40, 24), {}, [40, 40, 40]),
    "experts with fused projections": ((2, 48, 20), {"split_rows": 2}, [24] * 4),
    "heads": ((48, 40), {"split_rows": "4"}, [12] * 4),
    "query, key, value": ((70, 36), {"split_rows": (40, 15, 15)}, [40, 15, 15]),
    "a thin part": ((45, 40), {"split_rows": [40, 5]}, [40, 5]),
}


@pytest.mark.parametrize("method", METHOD_OPTIONS)
@pytest.mark.parametrize("case", SEVERAL)
def test_several_matrices_are_as_parameters_of_their_own(case: str, method: str) -> None:
    shape, views, rows = SEVERAL[case]
    gradients = [own[0] for own in replayed([shape], 9)]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (whole,) = trained([start], [[gradient] for gradient in gradients], **views, **METHOD_OPTIONS[method])

    def parts(tensor: Tensor) -> list[Tensor]:
        return list(tensor.reshape(-1, shape[-1]).split(rows))

    apart = trained(parts(start), [parts(gradient) for gradient in gradients], **METHOD_OPTIONS[method])
    assert torch.equal(torch.cat(apart).view(shape), whole)
    (single,) = trained([start], [[g] for g in gradients], **{**METHOD_OPTIONS[method], "batch_dims": 0})
    assert not torch.equal(single, whole)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
@example(63, 66)
@example(25, 168)
@example(16, 4096)
@example(4096, 16)
@example(128256, 4096)
@example(7 * 64 + 1, 64)
def test_factors_in_4_bits_take_at_most_5_bytes_per_parameter(rows: int, columns: int) -> None:
    matrix = Matrix.of("w", (rows, columns), COMPACT, torch.device("meta"))
    if rows * columns >= 4096 and min(rows, columns) > 1:
        assert matrix is not None and matrix.bytes_per_element <= 5
    for other in ({**METHODS["shampoo"], "method": "shampoo"}, PRESETS["shampoo-compact"]):
        options = PreconditionerOptions(**apply_preset(other))
        matrix = Matrix.of("w", (rows, columns), options, torch.device("meta"))
        if rows * columns >= 4096 and min(rows, columns) > 1:
            assert matrix is not None and matrix.bytes_per_element <= 10, "small factors are kept twice in float32"


def described(shapes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, str]:
    parameters = [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items()]
    lines = Shampoo4(parameters, **options).describe().splitlines()
    return {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in shapes}


def test_describe_tells_each_view_and_why() -> None:
    rows = described({
        "experts": (8, 512, 128), "experts.bias": (8, 512), "gate_up_bias": (8, 512), "conv": (64, 3, 7, 7),
        "whisper": (384, 80, 3), "mamba": (1536, 1, 4), "convnext": (96, 1, 7, 7), "gray": (192, 1, 16, 16),
        "lora_A": (16, 4096), "vocabulary": (32000, 256), "layer": (512, 512), "head": (1, 512),
        "position": (1, 65, 64), "queries": (256, 4, 64),
        "moe.experts.w1": (64, 32, 48),
    })  # fmt: skip
    assert "as 8 of 512 x 128 (a stack)" in rows["experts"] and "16 of 256 x 128" in rows["experts"]
    assert "no: stacked biases" in rows["experts.bias"] and "no: stacked biases" in rows["gate_up_bias"]
    assert "as 64 x 147" in rows["conv"] and "as 384 x 240" in rows["whisper"] and "as 192 x 256" in rows["gray"]
    assert "as 1536 x 4, columns only" in rows["mamba"] and "as 96 x 49" in rows["convnext"]
    assert "rows only, max_aspect=7" in rows["lora_A"] and "columns only, max_aspect=7" in rows["vocabulary"]
    assert " as " not in rows["layer"] and "only" not in rows["layer"] and "no: not a matrix" in rows["head"]
    assert "as 65 x 64" in rows["position"] and "as 256 x 256" in rows["queries"]
    assert "as 64 of 32 x 48 (a stack)" in rows["moe.experts.w1"]


def test_a_single_experts_convolution_is_no_stack() -> None:
    single = ["experts.0.weight", "experts.expert_1.conv.weight", "moe.experts.2", "experts.w1.3.weight"]
    stacks = ["0.experts.w1", "experts.0.experts.w1", "moe.shared_experts.w2"]
    rows = described(dict.fromkeys([*single, *stacks], (24, 12, 3)))
    assert all("as 24 x 36" in rows[name] for name in single)
    assert all("as 24 of 12 x 3" in rows[name] for name in stacks)


def test_describe_tells_the_exponent_of_roots_on_one_side() -> None:
    rows = described({"adapter": (16, 4096), "layer": (64, 64)}, method="shampoo")
    assert "rows only, max_aspect=7, exponent -1/2" in rows["adapter"] and "exponent" not in rows["layer"]


def test_describe_tells_what_options_did() -> None:
    rows = described({"qkv": (96, 64)}, split_rows=(64, 16, 16))
    assert "as 64 + 16 + 16 rows x 64 (split_rows=64,16,16)" in rows["qkv"]
    rows = described({"experts": (8, 64, 32), "bias": (8, 64)}, batch_dims=0)
    assert "as 8 x 2048" in rows["experts"] and "yes" in rows["bias"]
    rows = described({"layers": (4, 64, 32, 16)}, batch_dims=2)
    assert "as 256 of 32 x 16" in rows["layers"]


@pytest.mark.parametrize(("shape", "options", "message"), [
    ((96, 64), {"split_rows": 5}, "split_rows=5 does not divide the 96 rows of layer.weight"),
    ((96, 64), {"split_rows": (64, 16)}, r"split_rows=\(64, 16\) are 80 rows, and layer.weight has 96"),
    ((96, 64), {"split_rows": 0}, "split_rows must be an integer of at least 1, got 0"),
    ((96, 64), {"split_rows": "a"}, "split_rows must be an integer of at least 1, got 'a'"),
    ((96, 64), {"batch_dims": 3}, r"batch_dims=3 is more than layer.weight of shape \(96, 64\) has dimensions"),
    ((96, 64), {"batch_dims": -2}, "batch_dims must be an integer of at least -1, got -2"),
    ((96, 64), {"max_aspect": -1}, "max_aspect must be an integer of at least 0, got -1"),
])  # fmt: skip
def test_options_that_do_not_fit(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = Shampoo4([("layer.weight", parameter)], **options)
        parameter.grad = torch.ones(shape)
        optimizer.step()


def test_rows_of_an_embedding_without_gradients_stay_as_they_are() -> None:
    """Tied to an output or not: no number that is not finite, and nothing moves that had no gradient."""
    torch.manual_seed(0)
    for options in METHOD_OPTIONS.values():
        parameter = nn.Parameter(torch.randn(1000, 24))
        optimizer = Shampoo4([("embedding", parameter)], lr=1e-2, **options)
        start = parameter.detach().clone()
        for _ in range(8):
            parameter.grad = torch.zeros(1000, 24)
            parameter.grad[:40] = torch.randn(40, 24)
            optimizer.step()
        assert parameter.isfinite().all() and not torch.equal(parameter[:40], start[:40])
        assert torch.equal(parameter[40:], start[40:])


def test_experts_of_a_model_take_what_other_matrices_take() -> None:
    """Mixtral's, whose factors had 145 bytes per parameter as one matrix with a row for each expert."""
    config = MixtralConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    optimizer = Shampoo4(model.named_parameters(), preset="compact")
    rows = [line for line in optimizer.describe().splitlines() if "experts.gate_up_proj" in line]
    assert len(rows) == 2 and all("as 8 of 512 x 128 (a stack)" in row for row in rows)
    experts = [(name, p) for name, p in model.named_parameters() if "experts" in name]
    found = estimate_memory(experts, preset="compact").preconditioner[0]
    assert found / sum(p.numel() for _, p in experts) < 3.6
    former = estimate_memory(experts, preset="compact", batch_dims=0, max_aspect=0).preconditioner[0]
    assert former > 3 * found
