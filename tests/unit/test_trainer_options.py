"""What the Trainer's arguments say of Adam reaches a base optimizer that knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sharded_shampoo4.integrations.transformers import shampoo4
from sharded_shampoo4.options import DEFAULTS, METHODS
from sharded_shampoo4.presets import PRESETS

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


def test_options_in_the_trainer_s_optim_args(tmp_path: Path) -> None:
    """Options that are given win over them, as they do over a preset."""
    args = arguments(tmp_path)
    args.optim_args = "preset=compact, base=sgd,rectify_steps=(2, 3) , momentum=0.5,bits = 8"
    factory, options = shampoo4(args, momentum=0.9)
    group = factory()(nn.Linear(8, 6), **options).param_groups[0]
    expected = {**PRESETS["compact"], "rectify_steps": (2, 3), "momentum": 0.9, "bits": 8, "lr": 2e-3}
    assert {name: group[name] for name in expected} == expected


METHODS_AND_DEFAULTS = {
    "method=soap, soap_betas=(0.9, 0.99), bits=4, momentum_dtype=int8": {
        "method": "soap",
        "soap_betas": (0.9, 0.99),
        "bits": 4,
        "momentum_dtype": "int8",
        "statistics_interval": DEFAULTS["statistics_interval"],
    },
    "method=shampoo, statistics_interval=10, root_interval=50": {
        **METHODS["shampoo"],
        "method": "shampoo",
        "statistics_interval": 10,
        "root_interval": 50,
    },
}


@pytest.mark.parametrize("written", METHODS_AND_DEFAULTS)
def test_a_method_in_the_trainer_s_optim_args(written: str, tmp_path: Path) -> None:
    """It has its own defaults. Adam's options are those of the base."""
    args = arguments(tmp_path)
    args.optim_args = written
    factory, options = shampoo4(args)
    group = factory()(nn.Linear(8, 6), **options).param_groups[0]
    expected = {**METHODS_AND_DEFAULTS[written], "betas": (0.8, 0.95), "lr": 2e-3}
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("written", ["preset", "preset=", "=compact", "preset=compact, bits"])
def test_optim_args_that_are_no_options(tmp_path: Path, written: str) -> None:
    args = arguments(tmp_path)
    args.optim_args = written
    if written.endswith("bits"):  # a part of the value before it
        with pytest.raises(ValueError, match=r"preset must be one of .* got 'compact, bits'"):
            factory, options = shampoo4(args)
            factory()(nn.Linear(8, 6), **options)
    else:
        with pytest.raises(ValueError, match="optim_args must be options such as"):
            shampoo4(args)


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
