"""How others train: torchtitan's container of optimizers with its flat states, and PEFT's adapters, on two ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import worlds as hosts
from support import zero_worlds as zero
from support.marks import needs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sharded_shampoo4 import Shampoo4

WORDS = 30
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def words(step: int) -> Tensor:
    """The same on every rank."""
    return torch.randint(WORDS, (4, 12), generator=torch.Generator().manual_seed(step))


def whole(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    return {name: p.detach().clone() for name, p in found.items()}


# -- torchtitan --------------------------------------------------------------------------------------------------------


def titans_container(model: nn.Module, **options: Any) -> Any:
    """Its own container, which knows one optimizer more."""
    from torchtitan.components.optimizer import ParamGroupConfig

    from sharded_shampoo4.integrations.torchtitan import Shampoo4Container

    groups = [
        ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=r"[qkv]_proj", optimizer_name="Shampoo4", optimizer_kwargs={"split_rows": (2,)}),
        ParamGroupConfig(pattern=".*", optimizer_name="Shampoo4"),
    ]
    config = Shampoo4Container.Config(
        param_groups=groups, implementation="foreach", optimizer_factory_kwargs_by_name={"Shampoo4": options}
    )
    return config.build(model_parts=[model])


def titans_training(seed: int, **options: Any) -> tuple[nn.Module, Any]:
    """A model that is made on the meta device, sharded, and then initialized, as torchtitan does."""
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.model.rotary_emb.__init__(model.config)  # its buffers are no parameters, and were left empty
    return model, titans_container(model, **options)


def titans_steps(model: nn.Module, optimizers: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizers.zero_grad()
        loss = model(input_ids=words(step % 3), labels=words(step % 3)).loss
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    return losses


def train_as_torchtitan(rank: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    model, optimizers = titans_training(0, **options)
    losses = titans_steps(model, optimizers, range(5))
    saved = optimizers.state_dict()
    assert all(isinstance(key, str) for key in saved)
    dcp.save({"model": get_model_state_dict(model), "optimizer": saved}, checkpoint_id=folder)
    losses += titans_steps(model, optimizers, range(5, 10))
    other, fresh = titans_training(1, **options)
    state = {"model": get_model_state_dict(other), "optimizer": fresh.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    fresh.load_state_dict(state["optimizer"])
    again = titans_steps(other, fresh, range(5, 10))
    same = [torch.equal(a, b) for a, b in zip(whole(dict(model.named_parameters())).values(),
                                              whole(dict(other.named_parameters())).values(), strict=True)]  # fmt: skip
    described = next(line for line in optimizers.optimizers[1].describe().splitlines() if "gate_up_proj" in line)
    return {"losses": losses, "again": again, "same": all(same), "experts": described}


@needs("torchtitan")
@pytest.mark.parametrize("options", [{"lr": 1e-2}, {"lr": 1e-2, "preset": "compact"}], ids=["soap", "compact"])
def test_torchtitan(options: dict[str, Any], tmp_path: Any) -> None:
    found = hosts.run_ranks(2, train_as_torchtitan, str(tmp_path), {**options, "statistics_interval": 2})
    for result in found:
        assert result["same"] and result["again"] == result["losses"][5:]
        assert result["losses"][9] < 0.98 * result["losses"][0], "of the same words"
        assert "as 4 of 96 x 32 (a stack)" in result["experts"]
    assert found[0]["losses"] == found[1]["losses"]


# -- PEFT --------------------------------------------------------------------------------------------------------------


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="gaussian")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, lora)


OPTIONS: dict[str, Any] = {"lr": 1e-2, "statistics_interval": 2, "bits": 32, "max_aspect": 1}


def train_adapters(rank: int, host: str) -> dict[str, Any]:
    model = adapted()
    if host == "fsdp2":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Shampoo4(named, **OPTIONS)
    engine = None
    if host == "zero3":
        zero.prepare()
        engine = zero.start(model, zero.configuration(host), optimizer)
    losses = []
    for step in range(8):
        loss = (engine or model)(input_ids=words(step % 2), labels=words(step % 2)).loss
        losses.append(loss.item())
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    described = [line for line in optimizer.describe().splitlines() if "lora_" in line]
    return {"losses": losses, "described": described, "bytes": optimizer.state_bytes()["preconditioner"]}


@needs("peft")
@pytest.mark.parametrize("host", ["fsdp2", "zero3"])
def test_adapters(host: str) -> None:
    with hosts.one_thread():
        alone = train_adapters(0, "none")
    assert alone["losses"][6] < 0.98 * alone["losses"][0], "of the same words"
    found = hosts.run_ranks(2, train_adapters, host)
    for result in found:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-3), "gradients are averaged in another order"
        assert len(result["described"]) == 2 * 2 * 3 and all("yes: soap" in line for line in result["described"])
        thin = [line for line in result["described"] if "only, max_aspect=1" in line]
        assert len(thin) == 10, "all but the 16 rows of the values' adapters"
    assert sum(result["bytes"] for result in found) == alone["bytes"]
