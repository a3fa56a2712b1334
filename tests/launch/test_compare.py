"""launch/compare.py: what it trains, and how it names runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import forked  # launching finds launch/

# isort: split
import compare
from vit.args import parse_args
from vit.optim import build_optimizer  # all found through launching

from sharded_shampoo4 import Shampoo4


def test_compare_trains_what_is_missing_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three runs are made; the third diverges, is said to, and is not made again."""
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **_: forked.run(*command))
    flags = ("--max_train_steps", 6, "--max_train_samples", 96, "--max_eval_samples", 32, "--num_hidden_layers", 1)
    command = ["--output_dir", str(tmp_path), "--optimizers", "adamw", "shampoo4"]
    compare.main([*command, "--", *map(str, flags)])
    printed = capsys.readouterr().out
    assert printed.count("training ") >= 2 and "SOAP in 8-bit bases" in printed and "AdamW" in printed
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    (tmp_path / "sgd-seed0").mkdir()
    (tmp_path / "sgd-seed0" / "diverged.txt").write_text("the training loss of step 3 is nan")
    compare.main([*command, "sgd", "--", *map(str, flags)])
    printed = capsys.readouterr().out
    assert f"training {tmp_path}" not in printed
    assert "sgd-seed0 holds no finished run: it diverged" in printed
    with pytest.raises(SystemExit) as ended:
        compare.main([])
    assert ended.value.code == 2


def test_a_run_is_named_by_what_trained_it(tmp_path: Path) -> None:
    """DeepSpeed's configuration overrides --optimizer, whose default is shampoo4."""
    options, own = {"optimizer": "shampoo4", "seed": 0}, Shampoo4([torch.zeros(2, 2)]).param_groups[0]
    for name, entry in (("own", None), ("json", {"type": "AdamW", "params": {"lr": 1e-3}})):
        (tmp_path / name).mkdir()
        settings = {name: value for name, value in own.items() if name != "params"}
        found = {"options": options, "optimizer_options": settings, "epochs": 1.0, "deepspeed_optimizer": entry}
        (tmp_path / name / "all_results.json").write_text(json.dumps(found))
    runs = compare.read_runs([tmp_path / "json", tmp_path / "own"])
    assert list(runs) == ["AdamW of a DeepSpeed configuration", "SOAP in 8-bit bases, bfloat16 moments"]


def test_every_variant_has_a_name_of_its_own() -> None:
    """Or runs of different options would be taken for runs of different seeds."""
    layer = torch.nn.Linear(2, 2)
    for variants in (compare.OPTIMIZERS, compare.ABLATION, compare.MODES):
        given = [parse_args(["--output_dir", "runs/x", *flags]) for flags in variants.values()]
        groups = [build_optimizer(args, layer).param_groups[0] for args in given]
        found = [
            {"options": args.flat(), "optimizer_options": group} for args, group in zip(given, groups, strict=True)
        ]
        labels = list(map(compare.label_of, found))
        assert len(set(labels)) == len(labels), labels
