"""Warnings at construction: factors that outweigh their parameters, intervals in wrong order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.numerics.matrix import Matrix
from sharded_shampoo4.options import PreconditionerOptions

Shapes = Mapping[str, tuple[int, ...]]
SHAMPOO: dict[str, Any] = {"method": "shampoo"}
BOTH_SIDES: dict[str, Any] = {"max_aspect": 0, "batch_dims": 0}  # one matrix each, with factors of both sides


def parameters(shapes: Shapes, trained: bool = True) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.empty(shape, device="meta"), trained)) for name, shape in shapes.items()]


def warned(shapes: Shapes | nn.Module, **options: Any) -> list[str]:
    """What is said of parameters of these shapes when an optimizer is made of them."""
    named = shapes.named_parameters() if isinstance(shapes, nn.Module) else parameters(shapes)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Shampoo4(named, **options)
    assert all(warning.filename == __file__ for warning in found), "they point at the caller"
    return [str(warning.message) for warning in found]


# -- costs -------------------------------------------------------------------------------------------------------------

COSTLY: dict[str, tuple[Shapes, str]] = {
    "LoRA, r=8": (
        {"lora_A": (8, 4096), "lora_B": (4096, 8)},
        "2 of 2 parameters take 9.1 MiB, and the parameters themselves 256.0 KiB: lora_A (8, 4096) has 4.5 MiB of "
        "factors for 128.0 KiB of values (145 bytes per element; 11 with max_preconditioner_dim=64)",
    ),
    "many small LoRA": (
        {f"layer{n}": (8, 768) for n in range(24)},
        "24 of 24 parameters take 15.3 MiB, and the parameters themselves 576.0 KiB: layer0 (8, 768) has 654.5 KiB of "
        "factors for 24.0 KiB of values (109 bytes per element; 11 with max_preconditioner_dim=64); layer1",
    ),
    "Mamba's convolution": (
        {"conv1d.weight": (1536, 1, 4), "in_proj": (3072, 768)},
        "1 of 2 parameters take 1.3 MiB, and the parameters themselves 24.0 KiB: conv1d.weight (1536, 1, 4) has 1.3 "
        "MiB of factors for 24.0 KiB of values (218 bytes per element)",
    ),
    "a vocabulary": ({"embedding": (50257, 64)}, "embedding (50257, 64) has 54.9 MiB of factors for 12.3 MiB"),
    "biases of experts": ({"bias": (32, 5760)}, "bias (32, 5760) has 6."),
    "four dimensions": ({"odd": (3, 12, 64, 768)}, "odd (3, 12, 64, 768) has 652.5 MiB of factors for 6.8 MiB"),
}


@pytest.mark.parametrize("case", COSTLY)
def test_factors_that_outweigh_their_parameters_are_told(case: str) -> None:
    shapes, words = COSTLY[case]
    (message,) = warned(shapes, **SHAMPOO, **BOTH_SIDES)
    assert words in message
    assert "precondition=False" in message and "smaller max_preconditioner_dim" in message
    assert "max_aspect" in message
    assert warned(shapes) == warned(shapes, **SHAMPOO) == []


def test_smaller_blocks_cost_less() -> None:
    """Those of method="soap" have at most 256 rows and columns, even in 8 bits."""
    (message,) = warned(COSTLY["LoRA, r=8"][0], **BOTH_SIDES)
    assert "2 of 2 parameters take 2.1 MiB" in message and "lora_A (8, 4096) has 1.1 MiB of factors" in message
    assert warned(COSTLY["Mamba's convolution"][0], **BOTH_SIDES) == []


def test_one_warning_names_the_worst() -> None:
    (message,) = warned(
        {**{f"small{n}": (8, 512) for n in range(9)}, "worst": (4, 8192), "bad": (6, 4096)}, **BOTH_SIDES
    )
    assert message.index("worst (4, 8192)") < message.index("bad (6, 4096)") < message.index("; and 8 more")


USUAL: dict[str, Shapes] = {
    "a head of ten classes": {"head": (10, 768), **{f"layer{n}": (768, 768) for n in range(48)}},
    "a head of a thousand": {"head": (1000, 768)},
    "patches": {"patch": (768, 3, 16, 16), "position": (1, 197, 768), "token": (1, 1, 768)},
    "convolutions": {"stem": (64, 3, 7, 7), "deep": (512, 512, 3, 3), "point": (256, 64, 1, 1)},
    "convolutions in one dimension": {"whisper": (384, 80, 3), "wav2vec": (512, 512, 2), "gan": (256, 128, 11)},
    "vocabularies": {"gpt2": (50257, 768), "llama": (32000, 4096)},
    "segments of a large model": {"segments": (2, 1024), **{f"layer{n}": (4096, 1024) for n in range(48)}},
    "many tiny matrices": {f"layer{n}": (40, 44) for n in range(400)},
}


USUAL_OPTIONS: list[dict[str, Any]] = [
    {},
    {"bits": 4},
    {"bits": 32},
    {"preset": "compact"},
    SHAMPOO,
    {**SHAMPOO, "bits": 8},
    {**SHAMPOO, "bits": 32},
    {"preset": "shampoo-compact"},
]


@pytest.mark.parametrize("options", USUAL_OPTIONS, ids=str)
@pytest.mark.parametrize("case", USUAL)
def test_usual_layers_are_not_told(case: str, options: dict[str, Any]) -> None:
    assert warned(USUAL[case], **options) == []


def test_a_small_head_alone_is_not_told() -> None:
    assert warned({"head": (10, 768)}) == []


def test_usual_models_are_not_told() -> None:
    with torch.device("meta"):
        models = [GPT2LMHeadModel(GPT2Config()), ViTModel(ViTConfig())]
    for model in models:
        assert warned(model) == [] == warned(model, **SHAMPOO) == warned(model, **SHAMPOO, bits=32)


def test_what_is_told_once_is_not_told_again() -> None:
    shapes: Shapes = {"lora_A": (8, 4096)}
    with pytest.warns(UserWarning, match="lora_A"):
        optimizer = Shampoo4(parameters(shapes), **BOTH_SIDES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": parameters({"layer": (512, 512)})})
        optimizer.add_param_group({"params": parameters({"lora_B": (4096, 8)}), "precondition": False})
        optimizer.add_param_group({"params": parameters({"lora_C": (4096, 8)}), "max_preconditioner_dim": 64})
        Shampoo4(parameters(shapes, trained=False), **BOTH_SIDES)
        copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="lora_D") as found:
        optimizer.add_param_group({"params": parameters({"lora_D": (4096, 8)})})
    assert len(found) == 1 and found[0].filename == __file__


@pytest.mark.parametrize("split", ["aligned", "even", "remainder"])
@pytest.mark.parametrize("shape", [(8, 6), (1024, 1024), (2500, 1025), (5, 7000), (3, 500, 60)])
def test_bytes_are_those_of_the_blocks(shape: tuple[int, ...], split: Any) -> None:
    options = PreconditionerOptions(split=split, max_preconditioner_dim=100)
    matrix = Matrix.of("w", shape, options, torch.device("meta"))
    assert matrix is not None and matrix.nbytes == sum(map(matrix.block_bytes, matrix.blocks))


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_roots_that_come_before_statistics_are_told() -> None:
    (message,) = warned({"w": (8, 6)}, **SHAMPOO, statistics_interval=500, root_interval=100)
    assert "statistics_interval=500 is larger than root_interval=100" in message
    assert "until step 500 inverse roots are those of the initial statistics" in message
    assert warned({"w": (8, 6)}, **SHAMPOO, statistics_interval=500, root_interval=100, precondition=False) == []
    assert warned({"w": (8, 6)}, **SHAMPOO, statistics_interval=100, root_interval=100) == []
    assert warned({"w": (8, 6)}, statistics_interval=1000) == [], "soap has no roots"
    optimizer = Shampoo4(parameters({"w": (8, 6)}), **SHAMPOO)
    with pytest.warns(UserWarning, match="statistics_interval=9 is larger than root_interval=4"):
        optimizer.add_param_group({"params": parameters({"v": (8, 6)}), "statistics_interval": "9", "root_interval": 4})


def test_what_that_warning_says_is_so() -> None:
    parameter = nn.Parameter(torch.zeros(8, 6))
    with pytest.warns(UserWarning, match="until step 3 .*directions are plain gradients"):
        intervals = {"statistics_interval": 3, "root_interval": 1}
        optimizer = Shampoo4([("w", parameter)], base="sgd", grafting="none", **SHAMPOO, **intervals)
    for step in range(1, 5):
        gradient = torch.randn(8, 6)
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.allclose(parameter.grad, gradient * (parameter.grad.norm() / gradient.norm())) is (step < 3)
