"""What the launcher and DeepSpeed's configuration say of options that train_vit.py has as well, and used folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forked
from support.launching import LAUNCH, results, train

# isort: split
import train_vit  # found through launching, as the others are
from vit import report
from vit.args import parse_args
from vit.optim import build_optimizer

TWO = ("--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 8, "--num_hidden_layers", 1)
SHORT = (*TWO, "--max_train_steps", 2, "--max_train_samples", 64, "--max_eval_samples", 32)
TORCHRUN = (Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", 1)


def deepspeed_file(folder: Path, **changes: Any) -> Path:
    """Write zero2.json with ``changes``, and a decay of its own."""
    config = json.loads((LAUNCH / "configs" / "zero2.json").read_text()) | changes
    config["optimizer"]["params"]["weight_decay"] = 0.3
    (folder / "zero2.json").write_text(json.dumps(config))
    return folder / "zero2.json"


def test_another_accumulation_of_the_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    said = "--gradient_accumulation_steps is 2, but 4 in the launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    with pytest.raises(ValueError, match=said):
        train_vit.main(["--output_dir", str(tmp_path), *map(str, SHORT)])


def test_another_accumulation_of_deepspeeds_file_is_refused(tmp_path: Path) -> None:
    flags = ("--deepspeed_config", deepspeed_file(tmp_path, gradient_accumulation_steps=4))
    process = train(tmp_path, *SHORT, *flags, launcher=TORCHRUN, run=forked.run)
    assert process.returncode, "or the run has another accumulation than it plans with"
    assert "ValueError: --gradient_accumulation_steps is 2, but 4 in DeepSpeed's configuration" in process.stderr


def test_deepspeeds_file_takes_the_accumulation_and_gives_the_decay(tmp_path: Path) -> None:
    flags = ("--deepspeed_config", deepspeed_file(tmp_path))  # "auto"
    process = train(tmp_path, *SHORT, *flags, launcher=TORCHRUN, run=forked.run)
    assert process.returncode == 0, process.stderr[-3000:]
    assert results(tmp_path)["steps"] == 2 and results(tmp_path)["optimizer_options"]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("params", "decay"), [({"weight_decay": 0.3}, 0.3), ({"weight_decay": "auto"}, 0.2), ({}, 0.2)]
)
def test_a_number_in_deepspeeds_file_is_the_decay(params: dict[str, Any], decay: float) -> None:
    args = parse_args(["--weight_decay", "0.2"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = build_optimizer(args, model, None, {"type": "Shampoo4", "params": params})
    assert [group["weight_decay"] for group in optimizer.params] == [decay, 0.0]


@pytest.mark.parametrize("how", [[], ["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir"]])
def test_a_run_removes_the_results_of_an_earlier_one(
    how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    """A run killed in the folder would leave them, and they would pass for its own."""
    old = ("all_results.json", "curves.png", "health.png")
    for name in (*old, "metrics.jsonl"):
        (tmp_path / name).write_text("{}")

    def killed(*_: Any, **__: Any) -> None:
        assert not any((tmp_path / name).exists() for name in old)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_vit, "MetricsLog", killed)
    with pytest.raises(KeyboardInterrupt):
        train_vit.main(["--output_dir", str(tmp_path), *map(str, SHORT), *how])


def test_a_resumed_run_removes_the_results_of_the_earlier_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    command = ["--output_dir", str(tmp_path), *map(str, SHORT), "--checkpointing_steps", "1"]
    train_vit.main(command)
    assert results(tmp_path)["steps"] == 2

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    resumed = [*command, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")]
    with monkeypatch.context() as patch:
        patch.setattr(report.MetricsLog, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            train_vit.main(resumed)
    assert not (tmp_path / "all_results.json").exists() and not (tmp_path / "curves.png").exists()
    train_vit.main(resumed)
    assert results(tmp_path)["steps"] == 2
