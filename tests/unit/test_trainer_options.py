"""What the Trainer's arguments say of Adam reaches a base optimizer that knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sharded_shampoo4.integrations.transformers import shampoo4

ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), learning_rate=2e-3, weight_decay=0.1, use_cpu=True, report_to=[], **ADAM)


def test_options_of_adam_are_those_of_the_trainer_s_own(tmp_path: Path) -> None:
    args, model = arguments(tmp_path), nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    factory, options = shampoo4(args)
    trainer = Trainer(model, args)
    theirs = {group["weight_decay"]: group for group in trainer.create_optimizer().param_groups}
    optimizer = factory()(model, **options)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        for name in ("lr", "betas", "eps"):
            assert group[name] == theirs[group["weight_decay"]][name]
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6


@pytest.mark.parametrize("base", ["adamw", "AdamW", torch.optim.NAdam])
def test_options_that_are_given_win(tmp_path: Path, base: Any) -> None:
    _, options = shampoo4(arguments(tmp_path), base=base, betas=(0.5, 0.6))
    assert options["betas"] == (0.5, 0.6) and options["eps"] == 1e-6 and options["lr"] == 2e-3
    _, options = shampoo4(arguments(tmp_path), base=base, eps=1e-4, lr=1.0)
    assert options["betas"] == (0.8, 0.95) and options["eps"] == 1e-4 and options["lr"] == 1.0


@pytest.mark.parametrize("base", ["sgd", "adagrad", torch.optim.RMSprop])
def test_a_base_without_betas_gets_none_of_it(tmp_path: Path, base: Any) -> None:
    """Adagrad and RMSprop have an eps of their own, whose default is another than Adam's."""
    factory, options = shampoo4(arguments(tmp_path), base=base)
    assert options == {"lr": 2e-3, "weight_decay": 0.1, "base": base}
    factory()(nn.Linear(8, 6), **options)
