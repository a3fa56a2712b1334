"""A model with fused experts in the Trainer: their parts have factors of their own, and a resumed run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments, set_seed

from sharded_shampoo4.integrations.transformers import PortableTrainer, shampoo4

STEPS, SAVED, WORDS = 12, 7, 24


def sentences() -> list[dict[str, torch.Tensor]]:
    """Each word is followed by the next one of the list, or the one after."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 3, (96, 16), generator=generator).cumsum(1) % WORDS
    return [{"input_ids": row, "labels": row} for row in words]


def trainer(folder: Path, seed: int) -> PortableTrainer:
    set_seed(seed)
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False,
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.05, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **arguments)
    return PortableTrainer(
        MixtralForCausalLM(config),
        args,
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=shampoo4(args, preset="compact", split_fused=True),
    )


def losses(run: PortableTrainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trainer(tmp_path, seed=0)
    whole.train()
    found = losses(whole)
    assert len(found) == STEPS and found[-1] < 0.6 * found[0]
    rows = {line.split()[0]: line for line in whole.optimizer.optimizer.describe().splitlines() if "experts" in line}
    assert len(rows) == 4
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        assert "as 8 of 96 x 64 (split_rows=2)" in rows[f"{experts}.gate_up_proj"]
        assert "as 4 of 64 x 96 (a stack)" in rows[f"{experts}.down_proj"]
    resumed = trainer(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert losses(resumed)[-(STEPS - SAVED) :] == found[SAVED:]
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
