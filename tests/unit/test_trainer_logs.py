"""What the Trainer's factory leaves to the base, and what the callback adds to the Trainer's logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import needs
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.transformers import LogOptimizer, shampoo4

FIGURES = {
    f"optimizer_{name}"
    for name in (
        "orthogonality_error", "rectified_error", "smallest_eigenvalue", "largest_eigenvalue", "failures",
        "state_bytes", "ms_per_step",
    )
}  # fmt: skip


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied))


def left_to_base(model: nn.Module, tmp_path: Path, **options: Any) -> set[str]:
    factory, options = shampoo4(TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True), **options)
    optimizer = factory()(model, **options)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))
    return {name for group in optimizer.param_groups if not group["precondition"] for name in group["param_names"]}


EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ((), set()),
        ("embed|lm_head", EMBEDDINGS),
        (nn.Embedding, {"model.embed_tokens.weight"}),
        ([nn.Embedding, r"^lm_head\."], EMBEDDINGS),
        (r"layers\.0\.mlp\.(up|down)", {f"model.layers.0.mlp.{way}_proj.weight" for way in ("up", "down")}),
    ],
)
def test_exclude(exclude: Any, expected: set[str], tmp_path: Path) -> None:
    assert left_to_base(llama(), tmp_path, exclude=exclude) == expected


def test_exclude_in_optim_args_and_beside_fused_projections(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), optim_args="exclude=lm_head|attn, split_fused=true", use_cpu=True)
    factory, options = shampoo4(args)
    groups = factory()(llama(), **options).param_groups
    left = {name for group in groups if not group["precondition"] for name in group["param_names"]}
    assert left == {"lm_head.weight", *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")}


def test_exclude_knows_both_names_of_a_shared_parameter(tmp_path: Path) -> None:
    assert left_to_base(llama(tied=True), tmp_path, exclude="lm_head") == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("exclude", ["lm_heda", nn.Conv2d, ["embed", "nothing"]])
def test_exclude_that_is_true_of_nothing(exclude: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        left_to_base(llama(), tmp_path, exclude=exclude)


class Reports(TrainerCallback):
    """Records the logs, as callbacks for TensorBoard or W&B receive them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(dict(kwargs["logs"]))


def trained(folder: Path, *, log: bool = True, optimizer: Any = None, **more: Any) -> tuple[Trainer, Reports]:
    usual = {"report_to": "none", "max_steps": 10, "logging_steps": 4, "learning_rate": 2e-3}
    args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", **{**usual, **more})
    words = torch.randint(30, (32, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    reports = Reports()
    choice = {"optimizer_cls_and_kwargs": shampoo4(args, bits=4, min_quant_numel=1)} if optimizer is None else optimizer
    trainer = Trainer(llama(), args, train_dataset=data, eval_dataset=data[:4], callbacks=[reports], **choice)
    if log:
        trainer.add_callback(LogOptimizer(trainer))
    trainer.train()
    return trainer, reports


def test_the_logs_have_the_optimizer_s_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    health = Shampoo4.health
    monkeypatch.setattr(Shampoo4, "health", lambda self: measured.append(1) or health(self))
    trainer, reports = trained(tmp_path, eval_strategy="steps", eval_steps=2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8] and len(measured) == 2, "only in steps that are logged"
    for line in lines:
        assert line.keys() >= FIGURES and all(math.isfinite(line[name]) for name in FIGURES)
        assert 0 < line["optimizer_rectified_error"] <= line["optimizer_orthogonality_error"] < 0.3
        assert abs(line["optimizer_smallest_eigenvalue"]) < line["optimizer_largest_eigenvalue"]
        assert line["optimizer_failures"] == 0 and 0 < line["optimizer_ms_per_step"] < 10_000
    inner = trainer.optimizer.optimizer
    assert lines[-1]["optimizer_state_bytes"] == sum(inner.state_bytes().values())
    assert [line.keys() >= FIGURES for line in reports.seen if "loss" in line] == [True, True], "before it is reported"
    others = [line for line in trainer.state.log_history + reports.seen if "loss" not in line]
    assert others and not any(FIGURES & line.keys() for line in others), "evaluations, and the summary"
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks


def test_epochs_that_are_logged(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8] and all(line.keys() >= FIGURES for line in lines)


def test_training_is_the_same_without_it(tmp_path: Path) -> None:
    with_it, without = (trained(tmp_path, log=log)[0] for log in (True, False))
    for one, two in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_statistics_without_bases(tmp_path: Path) -> None:
    """Where no parameter has a figure, the log has none."""
    options = {"lr": 1e-3, "method": "shampoo", "bits": 32}
    trainer, _ = trained(tmp_path, optimizer={"optimizer_cls_and_kwargs": shampoo4(**options)})
    line = next(line for line in trainer.state.log_history if "loss" in line)
    missing = {"optimizer_orthogonality_error", "optimizer_rectified_error"}
    assert FIGURES - line.keys() == missing


def test_another_optimizer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="knows the figures of Shampoo4"):
        trained(tmp_path, optimizer={})


@needs("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for name in FIGURES:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [4, 8]


@needs("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trained(tmp_path, report_to="wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/{name}" for name in FIGURES} <= summary.keys()
    assert summary["train/global_step"] == 10 and list(tmp_path.rglob("*.wandb"))
