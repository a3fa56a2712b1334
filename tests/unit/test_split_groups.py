"""What is read off a model: which parameters are several matrices."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainingArguments

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.transformers import shampoo4
from sharded_shampoo4.integrations.views import split_groups, views_of

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50,
}  # fmt: skip
GROUPED: dict[str, Any] = {**TINY, "num_key_value_heads": 2}
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
    "MiniMaxModel": (  # lightning attention has query, key and value of the first head, then those of the second
        {**TINY, "head_dim": 8, "num_local_experts": 4, "layer_types": ["linear_attention"]},
        {"experts.gate_up_proj": (2,), "qkv_proj": (12,)}, {},
    ),
    "CodeGenModel": ({**TINY, "rotary_dim": 4}, {"qkv_proj": (12,)}, {}),
    "DeepseekV2Model": (
        {
            **TINY, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
        {}, {"q_proj": (4,)},
    ),
    "Gemma4TextModel": (  # two sizes of heads, which the configuration does not tell
        {
            **GROUPED, "num_hidden_layers": 2, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 50,
        },
        {},
        {f"layers.{layer}.self_attn.{n}_proj": (4 if n == "q" else 2,) for layer in (0, 1) for n in "qkv"},
    ),
    "Phi3ForCausalLM": (
        {**GROUPED, "pad_token_id": 0}, {"qkv_proj": (32, 16, 16), "gate_up_proj": (2,)}, {"qkv_proj": (8,)},
    ),
}  # fmt: skip


def make(name: str) -> Any:
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


class Wrapper(nn.Module):
    """What a LightningModule is, or any module with a model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Attention(nn.Module):
    """An attention module with these attributes and projections of so many rows, of 32 columns."""

    def __init__(self, projections: dict[str, int], **attributes: Any) -> None:
        super().__init__()
        for name, rows in projections.items():
            setattr(self, name, nn.Linear(32, rows, bias=False))
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, checkpoint_wrapper, lambda model: Wrapper(Wrapper(model))])
def test_parts_of_a_model_in_something_else(wrap: Any) -> None:
    """The configuration is that of the nearest module around, not that of the outermost."""
    for heads, sizes in ((False, (32, 16, 16)), (True, (8,))):
        found = by_end(views_of(wrap(make("Phi3ForCausalLM")), heads))
        assert sorted(found.values()) == sorted([sizes, (2,)])


def test_parts_of_models_in_a_model() -> None:
    text = transformers.Phi3Config(**GROUPED, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**{**TINY, "num_attention_heads": 2}, image_size=16, patch_size=8)
    model = transformers.LlavaModel(transformers.LlavaConfig(text_config=text, vision_config=vision))
    assert sorted(by_end(views_of(model)).values()) == [(2,), (32, 16, 16)]
    cut = by_end(views_of(model, heads=True))
    assert {size for name, size in cut.items() if "vision" in name} == {(2,)}
    assert {size for name, size in cut.items() if name.endswith("qkv_proj")} == {(8,)}


def test_parts_of_a_wrapped_layer() -> None:
    model = make("Phi3ForCausalLM")
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = checkpoint_wrapper(attention.qkv_proj)
    assert by_end(views_of(model))["model.layers.0.self_attn.qkv_proj"] == (32, 16, 16)


@pytest.mark.parametrize(("rows", "attributes", "parts", "heads"), [
    (96, {"num_heads": 4}, (3,), (12,)),
    (96, {}, (3,), (3,)),
    (96, {"head_dim": 4}, (3,), (24,)),
    (60, {}, None, None),  # grouped, or not
    (48, {"num_heads": 8, "num_key_value_heads": 2, "head_dim": 4}, (32, 8, 8), (12,)),
    (48, {"num_heads": 8, "n_kv_heads": 2, "embed_dim": 32}, (32, 8, 8), (12,)),
    (48, {"num_heads": 8, "num_key_value_groups": 4, "head_dim": 4}, (32, 8, 8), (12,)),
    (96, {"num_key_value_heads": 2}, None, None),  # perhaps (64, 16, 16): nothing tells
    (96, {"num_heads": 8, "head_dim": 8}, (64, 16, 16), (12,)),  # no thirds, though rows are 3 times the columns
    (96, {"num_heads": 12, "head_dim": 8}, None, None),  # no keys would be left
])  # fmt: skip
def test_joined_projections_without_a_configuration(
    rows: int, attributes: dict[str, Any], parts: tuple[int, ...] | None, heads: tuple[int, ...] | None
) -> None:
    model = Attention({"qkv_proj": rows}, **attributes)
    for wanted, found in ((parts, views_of(model)), (heads, views_of(model, heads=True))):
        assert by_end(found) == ({"qkv_proj": wanted} if wanted else {})


def test_numbers_that_differ_from_layer_to_layer_say_nothing() -> None:
    model: Any = Wrapper(Attention({"qkv_proj": 96}))
    model.config = SimpleNamespace(hidden_size=32, num_attention_heads=4, num_key_value_heads=[2, 4])
    assert by_end(views_of(model)) == {"model.qkv_proj": (3,)}


def test_heads_are_as_long_as_their_attention_module_says() -> None:
    separate = {"q_proj": 48, "k_proj": 24, "v_proj": 16}
    model: Any = nn.ModuleDict({
        "latent": Attention(separate, qk_head_dim=12, v_head_dim=8), "unknown": Attention(separate),
        "torch": nn.TransformerEncoderLayer(32, 4, 64),
    })  # fmt: skip
    model.config = transformers.LlamaConfig(**TINY)  # has heads of 8
    assert by_end(views_of(model, heads=True)) == {
        "latent.q_proj": (4,), "latent.k_proj": (2,), "latent.v_proj": (2,), "torch.self_attn.in_proj_weight": (12,)
    }  # fmt: skip
    assert by_end(views_of(model)) == {"torch.self_attn.in_proj_weight": (3,)}


class Experts(nn.Module):
    """Joined projections of experts, one beside the other or, transposed, one above the other."""

    def __init__(self, gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(gate_up))
        self.down_proj = nn.Parameter(torch.zeros(down))


@pytest.mark.parametrize(("gate_up", "down", "parts"), [
    ((4, 96, 32), (4, 32, 48), {"gate_up_proj": (2,)}),
    ((4, 32, 32), (4, 32, 16), {"gate_up_proj": (2,)}),
    ((6, 96, 32), (4, 32, 48), {"gate_up_proj": (2,)}),  # two of the experts are the identity, as in LongCat
    ((4, 32, 96), (4, 48, 32), {}),  # columns, as in Llama 4
    ((4, 32, 32), (4, 16, 32), {}),
])  # fmt: skip
def test_experts_projections_are_by_rows_if_what_follows_says_so(
    gate_up: tuple[int, ...], down: tuple[int, ...], parts: dict[str, tuple[int, ...]]
) -> None:
    assert by_end(views_of(Experts(gate_up, down))) == parts


def test_gates_of_recurrent_layers() -> None:
    model = nn.ModuleDict({
        "lstm": nn.LSTM(8, 16, proj_size=4, bidirectional=True), "gru": nn.GRU(8, 16), "plain": nn.RNN(8, 16),
        "cell": nn.LSTMCell(8, 16), "gru_cell": nn.GRUCell(8, 16),
    })  # fmt: skip
    lstm = {f"lstm.weight_{n}_l0{side}": (4,) for n in ("ih", "hh") for side in ("", "_reverse")}
    gru = {"gru.weight_ih_l0": (3,), "gru.weight_hh_l0": (3,), "gru_cell.weight_ih": (3,), "gru_cell.weight_hh": (3,)}
    assert by_end(views_of(model)) == {**lstm, **gru, "cell.weight_ih": (4,), "cell.weight_hh": (4,)}


def test_convolutions_in_experts_are_no_stacks() -> None:
    model = nn.ModuleDict({
        "experts": nn.ModuleList([nn.Conv1d(24, 48, 3)]), "shared_experts": nn.Conv1d(24, 48, 3),
    })  # fmt: skip
    assert views_of(model) == {"shared_experts.weight": {"batch_dims": 0}}
    rows = Shampoo4(split_groups(model)).describe().splitlines()
    assert sum("as 48 x 72" in row for row in rows) == 2


def test_parts_of_parameters_that_zero_3_has_taken() -> None:
    model = make("Phi3ForCausalLM")
    wanted = views_of(model)
    parameter: Any
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert views_of(model) == wanted


def test_the_trainers_factory_splits(tmp_path: Any) -> None:
    model = make("Phi3ForCausalLM")
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, optim_args="split_fused=true", use_cpu=True)
    factory, options = shampoo4(args)
    optimizer = factory()(model, **options)
    decays = {bool(group["weight_decay"]): 0 for group in optimizer.param_groups}
    assert set(decays) == {True, False}
    sizes = {name: group["split_rows"] for group in optimizer.param_groups for name in group["param_names"]}
    assert sizes["model.layers.0.mlp.gate_up_proj.weight"] == (2,) and sizes["lm_head.weight"] == ()
