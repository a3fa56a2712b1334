"""axolotl's plugin: its own base class, its merged configuration, and its way of making the optimizer."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import needs
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sharded_shampoo4 import Shampoo4

pytestmark = needs("axolotl", "addict")
PLUGIN = "sharded_shampoo4.integrations.axolotl.Shampoo4Plugin"
GROUPING = ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))


def own_trainer() -> type[Trainer]:
    """A Trainer with axolotl's own ``create_optimizer``; the package around that file needs all that axolotl does."""
    (package,) = importlib.util.find_spec("axolotl").submodule_search_locations  # type: ignore[union-attr]
    file = Path(package) / "core" / "trainers" / "mixins" / "optimizer.py"
    spec = importlib.util.spec_from_file_location("axolotl_optimizer", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return type("OwnTrainer", (module.OptimizerMixin, Trainer), {})


def trained(folder: Path, written: dict[str, Any], **others: Any) -> Trainer:
    """A training as ``axolotl.train`` does it with the plugins that the YAML file names."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault({"plugins": [PLUGIN], "optimizer": "adamw_torch", **written})
    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    assert list(manager.plugins) == [PLUGIN]
    args = TrainingArguments(
        str(folder), learning_rate=2e-3, weight_decay=0.1, max_steps=6, logging_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    for name in GROUPING:
        setattr(args, name, others.get(name))
    words = torch.randint(30, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    trainer = own_trainer()(llama(), args, train_dataset=data)
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    return trainer


def inner(trainer: Any) -> Any:
    return trainer.optimizer.optimizer


def test_the_key_asks_for_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path, {"shampoo4": {"preset": "compact", "exclude": "embed|lm_head"}})
    optimizer = inner(trainer)
    assert isinstance(optimizer, Shampoo4)
    for group in optimizer.param_groups:
        assert group["bits"] == 4 and group["initial_lr"] == 2e-3
    left = {name for group in optimizer.param_groups if not group["precondition"] for name in group["param_names"]}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and optimizer.health()["model.layers.0.mlp.up_proj.weight"]["steps"] == 6


def test_no_options_are_enough(tmp_path: Path) -> None:
    assert isinstance(inner(trained(tmp_path, {"shampoo4": {}})), Shampoo4)


def test_without_the_key_it_does_nothing(tmp_path: Path) -> None:
    assert isinstance(inner(trained(tmp_path, {})), torch.optim.AdamW)


def test_what_would_have_no_effect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out embedding_lr"):
        trained(tmp_path, {"shampoo4": {}}, embedding_lr=1e-4)


def test_the_key_is_known() -> None:
    """axolotl merges the plugin's keys into its own by their name."""
    from axolotl.integrations.base import load_plugin

    module, _, name = load_plugin(PLUGIN).get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(module), name)
    assert keys(shampoo4={"bits": 4}).model_dump() == {"shampoo4": {"bits": 4}}
    assert keys().shampoo4 is None
