"""What the Trainer's arguments say reaches the optimizer; checkpoints of its kind, and the plugin that uses both."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.transformers import ConsolidateStates, PortableTrainer, _newest, shampoo4
from sharded_shampoo4.options import DEFAULTS, METHODS
from sharded_shampoo4.presets import PRESETS

ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), learning_rate=2e-3, weight_decay=0.1, use_cpu=True, report_to=[], **ADAM)


def made(args: TrainingArguments, model: nn.Module | None = None, **options: Any) -> Shampoo4:
    factory, found = shampoo4(args, **options)
    return factory()(model or nn.Linear(8, 6), **found)


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
    group = made(arguments(tmp_path), base=base, betas=(0.5, 0.6)).param_groups[0]
    assert group["betas"] == (0.5, 0.6) and group["eps"] == 1e-6 and group["lr"] == 2e-3
    group = made(arguments(tmp_path), base=base, eps=1e-4, lr=1.0).param_groups[0]
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-4 and group["lr"] == 1.0


@pytest.mark.parametrize(("base", "eps"), [("sgd", None), ("adagrad", 1e-10), (torch.optim.RMSprop, 1e-8)])
def test_a_base_without_betas_gets_none_of_it(tmp_path: Path, base: Any, eps: float | None) -> None:
    """Adagrad and RMSprop have an eps of their own, whose default is another than Adam's."""
    group = made(arguments(tmp_path), base=base).param_groups[0]
    assert "betas" not in group and group.get("eps") == eps
    assert group["lr"] == 2e-3 and group["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("changed", "options", "said"),
    [
        ({"adam_beta1": 0.8}, {}, "adam_beta1=0.8 of TrainingArguments do not reach matrices.* give soap_betas, in"),
        ({"adam_epsilon": 1e-6}, {"preset": "compact"}, "adam_epsilon=1e-06 of .* give soap_eps, in optim_args"),
        (ADAM, {}, "adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-06 of .* give soap_betas and soap_eps, in"),
        (ADAM, {"soap_betas": (0.8, 0.95)}, "^adam_epsilon=1e-06 of .* give soap_eps, in"),
        (ADAM, {"soap_betas": (0.8, 0.95), "soap_eps": 1e-6}, ""),
        (ADAM, {"method": "shampoo"}, ""),
        (ADAM, {"preset": "paper"}, ""),
        (ADAM, {"precondition": False}, ""),
        ({}, {}, ""),
    ],
)
def test_options_of_adam_that_do_not_reach_matrices_are_warned_of(
    changed: dict[str, float], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **changed)
    for given, args.optim_args in ((options, ""), ({}, ", ".join(f"{k}={v}" for k, v in options.items()))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made(args, **given)
        found = [str(warning.message) for warning in caught if "TrainingArguments" in str(warning.message)]
        assert len(found) == bool(said) and all(re.search(said, message) for message in found), found


class Named(nn.Sequential):
    """Returns what the Trainer asks for."""

    def __init__(self) -> None:
        layers = {"embed": nn.Linear(8, 16), "fc": nn.Linear(16, 16), "lm_head": nn.Linear(16, 4)}
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(8, generator=generator), "labels": torch.tensor(label % 4)} for label in range(32)]


def short_run(folder: Path, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, **others,
    )  # fmt: skip


def left_out(optimizer: Shampoo4) -> set[str]:
    groups = [group for group in optimizer.param_groups if not group["precondition"]]
    return {name for group in groups for name in group["param_names"]}


BOTH = {f"{layer}.{kind}" for layer in ("embed", "lm_head") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "written",
    [
        "embed|lm_head",
        "(embed|lm_head)",
        "[embed, lm_head]",
        "['embed', \"lm_head\" ,]",
        "[em[ab]ed, l[mn,]_head]",
        "[em(b|c){1,2}ed,lm_head]",
        "[eE]mbed|lm_hea[d]",
    ],
)
def test_patterns_in_the_trainer_s_optim_args(tmp_path: Path, written: str) -> None:
    """A list is not one class of characters, which most names have one of."""
    args = arguments(tmp_path)
    args.optim_args = f"preset=compact, exclude={written}, bits=8"
    optimizer = made(args, Named())
    assert left_out(optimizer) == BOTH and optimizer.param_groups[0]["bits"] == 8


def test_a_bracket_that_is_not_closed(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.optim_args = "exclude=[embed, lm_head"
    with pytest.raises(ValueError, match=r"exclude: '\[embed, lm_head' is no regular expression"):
        made(args, Named())


def test_an_empty_list_excludes_nothing(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.optim_args = "exclude=[]"
    assert left_out(made(args, Named())) == set()


@pytest.mark.parametrize("exclude", ["[eml]", "weight", nn.Linear, ["embed", "fc", "lm_head"]])
def test_something_is_left_to_precondition(tmp_path: Path, exclude: Any) -> None:
    with pytest.raises(ValueError, match=r"exclude=.* leaves no matrix to precondition: embed.weight, fc.weight, lm_"):
        made(arguments(tmp_path), Named(), exclude=exclude)
    made(arguments(tmp_path), nn.LayerNorm(8), exclude="weight")  # had none before


@pytest.mark.parametrize("written", ["0", "1", "no", "yes", "2"])
def test_words_that_are_no_booleans(tmp_path: Path, written: str) -> None:
    args = arguments(tmp_path)
    args.optim_args = f"split_fused={written}"
    with pytest.raises(ValueError, match=f"split_fused must be True or False, got '{written}'"):
        made(args, Named())
    args.optim_args = None
    with pytest.raises(ValueError, match="split_fused must be True or False, got None"):
        made(args, Named(), split_fused=None)


@pytest.mark.parametrize("written", ["True", "false"])
def test_words_that_are_booleans(tmp_path: Path, written: str) -> None:
    args = arguments(tmp_path)
    args.optim_args = f"split_fused={written}"
    made(args, Named())


def test_arguments_are_read_when_the_optimizer_is_made(tmp_path: Path) -> None:
    """By each trial of a search, which has written its own there. What was given otherwise stays."""
    args = arguments(tmp_path)
    factory, options = shampoo4(args, betas=(0.5, 0.6), total_steps=50)
    trainer = Trainer(model_init=Named, args=args, optimizer_cls_and_kwargs=(factory, options))
    for trial in ({"learning_rate": 5e-2, "weight_decay": 0.3}, {"learning_rate": 7e-2, "weight_decay": 0.0}):
        trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.RAY, dict
        trainer._hp_search_setup({**trial, "adam_epsilon": 1e-5, "optim_args": "bits=4"})
        trainer.optimizer = None
        group = trainer.create_optimizer().param_groups[0]
        assert (group["lr"], group["weight_decay"]) == tuple(trial.values())
        assert (group["betas"], group["eps"], group["bits"]) == ((0.5, 0.6), 1e-5, 4)
    args.optim_args = "preset"
    with pytest.raises(ValueError, match="optim_args must be options such as"):
        shampoo4(args)


def test_another_optimizer_is_saved_as_the_trainer_does(tmp_path: Path) -> None:
    def trainer() -> PortableTrainer:
        return PortableTrainer(Named(), short_run(tmp_path, optim="adamw_torch"), train_dataset=images())

    trainer().train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "scheduler.pt"} <= files and "shampoo4" not in files
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_the_newest_checkpoint_is_one_of_the_trainer_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-x-20", "checkpoint-30"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-30":
            (tmp_path / name / "trainer_state.json").touch()
    for name in ("checkpoint-40.tar", "checkpoint-50"):
        (tmp_path / name).touch()
    assert _newest(tmp_path) == tmp_path / "checkpoint-10"
    (said,) = caplog.messages
    assert "checkpoint-30 was never finished" in said
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        _newest(tmp_path / "checkpoint-9")


def test_the_plugin_of_axolotl_has_states_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without axolotl itself, of which the plugin needs a base class only."""
    base = type("Module", (), {"BasePlugin": object})
    for name, module in {"axolotl": base, "axolotl.integrations": base, "axolotl.integrations.base": base}.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "sharded_shampoo4.integrations.axolotl", raising=False)
    plugin = importlib.import_module("sharded_shampoo4.integrations.axolotl")
    monkeypatch.delitem(sys.modules, "sharded_shampoo4.integrations.axolotl")
    for kind, expected in ((Trainer, 1), (PortableTrainer, 0)):
        args = short_run(tmp_path / kind.__name__)
        trainer = kind(Named(), args, train_dataset=images())
        plugin.Shampoo4Plugin().post_trainer_create(SimpleNamespace(shampoo4={"preset": "compact"}), trainer)
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert callbacks.count(ConsolidateStates) == expected
        factory, options = trainer.optimizer_cls_and_kwargs
        assert isinstance(factory()(trainer.model, args, **options), Shampoo4)  # as axolotl calls it
        trainer.train()
