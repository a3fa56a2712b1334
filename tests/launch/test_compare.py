"""launch/compare.py and the errors of stored preconditioners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import forked  # launching finds launch/

# isort: split
import compare
import quantization_errors
from vit.args import parse_args
from vit.optim import build_optimizer  # all found through launching

from sharded_shampoo4 import Shampoo4, checkpoint


def test_compare_trains_what_is_missing_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three runs are made; the third diverges, is said to, and is not made again."""
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **_: forked.run(*command))
    flags = ("--max_train_steps", 6, "--max_train_samples", 96, "--max_eval_samples", 32, "--num_hidden_layers", 1)
    command = ["--output_dir", str(tmp_path), "--optimizers", "adamw", "shampoo4"]
    compare.main([*command, "--", *map(str, flags)])
    printed = capsys.readouterr().out
    assert printed.count("training ") >= 2 and "4-bit Shampoo" in printed and "AdamW" in printed
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
    assert list(runs) == ["AdamW of a DeepSpeed configuration", "4-bit Shampoo"]


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


def test_errors_of_a_preconditioner_of_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(90, 90)).Q
    layer = torch.nn.Linear(70, 90)
    optimizer = Shampoo4(layer.named_parameters(), bits=32, statistics_interval=1, root_interval=1, shampoo_beta=0.9)
    total = 1e-6 * torch.eye(90, dtype=torch.float64)
    for _ in range(60):
        layer.weight.grad = basis @ (torch.logspace(0, -3, 90)[:, None] * torch.randn(90, 70))
        total = 0.9 * total + 0.1 * layer.weight.grad.double() @ layer.weight.grad.double().T
        optimizer.step()
    checkpoint.save(optimizer, tmp_path)
    name, matrix = quantization_errors.largest_preconditioner(tmp_path)
    assert name == "a preconditioner of order 90"
    torch.testing.assert_close(matrix, total, rtol=1e-5, atol=1e-7)
    found = quantization_errors.errors(matrix)
    for book in ("linear2", "dynamic_tree"):
        naive, rough, rectified = (found[(book, 4, *way)][0] for way in (("A", False), ("U", False), ("U", True)))
        assert naive > rough > rectified > 0
    assert found["linear2", 4, "U", True][0] < found["linear2", 3, "U", True][0]
    layouts = quantization_errors.layout_errors(matrix)
    assert layouts["stored roots", 4][0] == pytest.approx(found["linear2", 4, "U and root", True][0], rel=1e-4)
    assert layouts["implicit roots", 4][0] == pytest.approx(found["linear2", 4, "U", True][0], rel=1e-4)
    assert layouts["compact", 4][0] < layouts["stored roots", 4][0] and layouts["compact", 4][2] < 5
    four = Shampoo4(layer.named_parameters())
    checkpoint.save(four, tmp_path / "four")
    with pytest.raises(SystemExit, match="the errors need one with 32"):
        quantization_errors.largest_preconditioner(tmp_path / "four")
