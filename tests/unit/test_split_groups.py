"""What is read off a model: which parameters are several matrices."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.transformers import shampoo4
from sharded_shampoo4.integrations.views import split_groups, views_of

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
GROUPED = {**TINY, "num_key_value_heads": 2}
LLAMA_HEADS = {"self_attn.q_proj": (4,), "self_attn.k_proj": (2,), "self_attn.v_proj": (2,)}

# Name of the model: its configuration, what is found by itself, and what for heads.
MODELS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "ViTModel": ({**TINY, "image_size": 8, "patch_size": 2}, {}, {f"{n}_proj": (4,) for n in "qkv"}),
    "LlamaForCausalLM": (GROUPED, {}, LLAMA_HEADS),
    "Qwen3ForCausalLM": ({**GROUPED, "head_dim": 8}, {}, LLAMA_HEADS),
    "Qwen3MoeForCausalLM": (
        {**GROUPED, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
        {"experts.gate_up_proj": (2,)}, LLAMA_HEADS,
    ),
    "GPTNeoXForCausalLM": (TINY, {"query_key_value": (12,)}, {}),
    "MixtralForCausalLM": ({**GROUPED, "num_local_experts": 4}, {"experts.gate_up_proj": (2,)}, LLAMA_HEADS),
    "GptOssForCausalLM": (
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "layer_types": ["full_attention"]}, {}, LLAMA_HEADS,
    ),
    "Phi3ForCausalLM": (
        {**GROUPED, "pad_token_id": 0}, {"qkv_proj": (32, 16, 16), "gate_up_proj": (2,)}, {"qkv_proj": (8,)},
    ),
}  # fmt: skip


def make(name: str) -> nn.Module:
    model = getattr(transformers, name)
    torch.manual_seed(0)
    return model(model.config_class(**MODELS[name][0]))


def by_end(found: dict[str, dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): options["split_rows"] for name, options in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_models(name: str) -> None:
    _, fused, heads = MODELS[name]
    model = make(name)
    for wanted, found in ((fused, views_of(model)), ({**fused, **heads}, views_of(model, heads=True))):
        ends = by_end(found)
        assert len(ends) == len(wanted)
        for end, sizes in wanted.items():
            assert [own for key, own in ends.items() if key.endswith(end)] == [sizes]
    assert sum(len(group["params"]) for group in split_groups(model)) == len(list(model.parameters()))


def test_parts_are_those_that_the_model_takes() -> None:
    """Gate and up of Mixtral's experts: the second half of the rows is what the activations are multiplied by."""
    model = make("MixtralForCausalLM")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[:, 48:] = 0
    output = model.model.layers[0].mlp(torch.randn(1, 3, 32))
    assert not (output[0] if isinstance(output, tuple) else output).any()


def test_modules_of_torch(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(32, 4), "depthwise": nn.Conv2d(16, 16, 3, groups=16),
        "gray": nn.Conv2d(1, 16, 3), "wide": nn.Conv1d(8, 24, 40), "usual": nn.Conv2d(3, 16, 3),
    })  # fmt: skip
    with caplog.at_level(logging.INFO):
        optimizer = Shampoo4(split_groups(model))
    assert "split_rows=(3,) for attention.in_proj_weight (1 in all)" in caplog.text
    rows = {line.split()[0]: line for line in optimizer.describe().splitlines() if "." in line}
    assert "as 3 of 32 x 32 (split_rows=3)" in rows["attention.in_proj_weight"]
    assert "as 16 x 9" in rows["depthwise.weight"] and "as 16 x 27" in rows["usual.weight"]
    assert "as 16 x 9" in rows["gray.weight"] and "as 24 x 320" in rows["wide.weight"]


def test_the_trainers_factory_splits(tmp_path: Any) -> None:
    model = make("Phi3ForCausalLM")
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, optim_args="split_fused=true", use_cpu=True)
    factory, options = shampoo4(args)
    optimizer = factory()(model, **options)
    decays = {bool(group["weight_decay"]): 0 for group in optimizer.param_groups}
    assert set(decays) == {True, False}
    sizes = {name: group["split_rows"] for group in optimizer.param_groups for name in group["param_names"]}
    assert sizes["model.layers.0.mlp.gate_up_proj.weight"] == (2,) and sizes["lm_head.weight"] == ()
