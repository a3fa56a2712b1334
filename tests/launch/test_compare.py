"""launch/compare.py: what it trains, and how it names runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgba
from support import forked
from support.drawn import Drawn
from support.launching import LAUNCH  # finds launch/

# isort: split
import compare
import plots
from vit import report, side_by_side
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
    assert printed.count("training ") >= 2 and "Shampoo4" in printed and "AdamW" in printed
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


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of runs, which are not made. A run with a rate of 9 diverges."""
    made: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        made.append(command)
        Path(command[command.index("--output_dir") + 1]).mkdir(parents=True, exist_ok=True)
        diverges = command[command.index("--learning_rate") + 1] == "9"
        return SimpleNamespace(returncode=int(diverges), stderr="FloatingPointError: step 3 is nan" if diverges else "")

    monkeypatch.setattr(compare.subprocess, "run", run)
    return made


def flat(*flags: str) -> dict[str, Any]:
    return json.loads(json.dumps(parse_args([*flags]).flat()))


def finish(folder: Path, *flags: str, loss_steps: tuple[int, ...] = (), **options: Any) -> Path:
    """Write the files of a finished run."""
    folder.mkdir(parents=True)
    found = {"options": {**flat(*flags), **options}, "epochs": 1.0, "steps": 20, "total_seconds": 2.0}
    found |= {"state_bytes": {"base": 8, "preconditioner": 0}, "train_loss": 1.0, "eval_accuracy": 0.5}
    (folder / "all_results.json").write_text(json.dumps(found))
    lines = [{"step": step, "epoch": step / 20, "loss": 1.0, "eval_accuracy": 0.5} for step in loss_steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train_adamw(folder: Path, *flags: str, seeds: tuple[int, ...] = (0,)) -> None:
    compare.train(folder, {"adamw": ("--optimizer", "adamw")}, seeds, flags)


def test_a_finished_run_of_other_options_is_not_taken(tmp_path: Path, commands: list[list[str]]) -> None:
    finish(tmp_path / "adamw-seed1", "--optimizer", "adamw", "--learning_rate", "0.1", "--seed", "1")
    said = rf"{tmp_path}/adamw-seed1 holds .* learning_rate was 0\.1, is 0\.2\. Give another --output_dir"
    with pytest.raises(SystemExit, match=said):
        train_adamw(tmp_path, "--learning_rate", "0.2", seeds=(0, 1))
    assert not commands, "refused before a run is made"
    train_adamw(tmp_path, "--learning_rate", "0.1", "--logging_steps", "3", seeds=(1,))
    assert not commands, "it is taken: how often it logs changes nothing"
    train_adamw(tmp_path, "--learning_rate", "0.1", seeds=(0, 1, 0))
    assert len(commands) == 1 and commands[0][-2:] == ["--resume_from_checkpoint", "latest"]


def test_an_option_that_an_older_run_does_not_know_was_at_its_default(tmp_path: Path) -> None:
    folder = finish(tmp_path / "adamw-seed0", "--optimizer", "adamw")
    results = json.loads((folder / "all_results.json").read_text())
    del results["options"]["nesterov"]
    (folder / "all_results.json").write_text(json.dumps(results))
    train_adamw(tmp_path)
    with pytest.raises(SystemExit, match="nesterov was False, is True"):
        train_adamw(tmp_path, "--nesterov")


def test_a_run_cut_off_does_not_go_on_with_other_options(tmp_path: Path, commands: list[list[str]]) -> None:
    for step, rate in ((9, "0.3"), (10, "0.1")):
        (tmp_path / "adamw-seed0" / f"checkpoint-{step}").mkdir(parents=True)
        options = flat("--optimizer", "adamw", "--learning_rate", rate) | {"step_images": 64, "epoch_steps": 3}
        marker = tmp_path / "adamw-seed0" / f"checkpoint-{step}" / "complete.json"
        marker.write_text(json.dumps({"step": step, "options": options}))
    with pytest.raises(SystemExit, match=r"learning_rate was 0\.1, is 0\.2"):
        train_adamw(tmp_path, "--learning_rate", "0.2")
    train_adamw(tmp_path, "--learning_rate", "0.1")
    assert commands[0][-2:] == ["--resume_from_checkpoint", "latest"]


def test_a_run_that_diverged_is_made_anew_with_other_options(tmp_path: Path, commands: list[list[str]]) -> None:
    folder = tmp_path / "adamw-seed0"
    for _ in range(2):
        train_adamw(tmp_path, "--learning_rate", "9")
    assert len(commands) == 1 and "FloatingPointError" in (folder / "diverged.txt").read_text()
    train_adamw(tmp_path, "--learning_rate", "0.1")
    assert len(commands) == 2 and commands[1][-1] == "--overwrite_output_dir", "not from checkpoints of the other run"
    assert "--resume_from_checkpoint" not in commands[1] and not (folder / "diverged.txt").exists()
    (folder / "diverged.txt").write_text("{'an older file': 'has no options'}\n")
    train_adamw(tmp_path, "--learning_rate", "0.2")
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *((["--output_dir", "x", "--", *own], f"{own[0]} after -- has no effect") for own in (
            ["--seed", "5"], ["--seed=5"], ["--optimizer", "sgd"], ["--output_dir", "y"], ["--output-dir", "y"],
            ["--resume_from_checkpoint", "y"], ["--overwrite_output_dir"],
        )),
        (["--output_dir", "x", "--ablation", "--optimizers", "sgd"], "drop --optimizers"),
        (["--output_dir", "x", "--tasks", "vit", "--", "--decay_all"], "drop --optimizers"),
        (["x", "--optimizers", "sgd"], "need --output_dir"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse_args(given)
    assert said in capsys.readouterr().err
    assert compare.parse_args(["--output_dir", "x", "--", "--decay_all"])[0].optimizers[0] == "adamw"


@pytest.mark.parametrize("recipe", sorted((LAUNCH / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipes_preset_leaves_no_two_equal_optimizers(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(compare, "train", lambda folder, variants, *_: trained.extend(variants))
    with pytest.raises(SystemExit, match="no finished run"):
        compare.main(["--output_dir", str(tmp_path), "--", "--recipe", str(recipe)])
    assert trained == ["adamw", "shampoo32", "shampoo4-paper"]
    assert "shampoo4 is left out: with these flags it is the same as shampoo4-paper" in capsys.readouterr().out


def test_a_second_run_of_a_name_is_shown_with_its_folder(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name / "adamw-seed0" for name in "abc")
    for folder, epochs in ((first, 1.0), (second, 1.0), (third, 2.0)):
        folder.mkdir(parents=True)
        found = {"options": {"optimizer": "adamw", "seed": 0}, "epochs": epochs}
        (folder / "all_results.json").write_text(json.dumps(found))
    assert list(compare.read_runs([first, second, second])) == ["AdamW", f"AdamW ({second})"]
    every = compare.read_runs([first, second, third])
    assert list(every) == ["AdamW, 1 epochs", f"AdamW ({second}), 1 epochs", "AdamW, 2 epochs"]


def test_runs_of_other_options_are_no_seeds_of_one_optimizer(tmp_path: Path) -> None:
    options = ("--optimizer", "adamw", "--learning_rate")
    same = [finish(tmp_path / f"{seed}", *options, "0.1", seed=seed, logging_steps=seed + 1) for seed in (0, 1)]
    other = finish(tmp_path / "other", *options, "0.2", seed=2)
    runs = compare.read_runs([*same, other])
    assert {label: list(seeds) for label, seeds in runs.items()} == {"AdamW": [0, 1], f"AdamW ({other})": [2]}


def test_logs_without_a_step_in_common_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of seeds that log every 10 steps and every 8."""
    folders = [
        finish(tmp_path / f"{seed}", "--optimizer", "adamw", seed=seed, loss_steps=steps)
        for seed, steps in enumerate([(10, 20), (8, 16)])
    ]
    compare.main([*map(str, folders), "--output", str(tmp_path / "x.png")])
    assert "AdamW: the logs have no step in common, so no training loss is drawn" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_run_is_named_by_what_trained_it(tmp_path: Path) -> None:
    """DeepSpeed's configuration overrides --optimizer, whose default is shampoo4."""
    options, own = {"optimizer": "shampoo4", "seed": 0}, Shampoo4([torch.zeros(2, 2)]).param_groups[0]
    for name, entry in (("own", None), ("json", {"type": "AdamW", "params": {"lr": 1e-3}})):
        (tmp_path / name).mkdir()
        settings = {name: value for name, value in own.items() if name != "params"}
        found = {"options": options, "optimizer_options": settings, "epochs": 1.0, "deepspeed_optimizer": entry}
        (tmp_path / name / "all_results.json").write_text(json.dumps(found))
    runs = compare.read_runs([tmp_path / "json", tmp_path / "own"])
    assert list(runs) == ["AdamW of a DeepSpeed configuration", "Shampoo4"]


def test_every_variant_has_a_name_of_its_own() -> None:
    """Or runs of different options would be taken for runs of different seeds."""
    layer = torch.nn.Linear(2, 2)
    for variants in (compare.OPTIMIZERS, compare.ABLATION, compare.MODES):
        assert compare.distinct(variants, []) == variants
        given = [parse_args(["--output_dir", "runs/x", *flags]) for flags in variants.values()]
        groups = [build_optimizer(args, layer).param_groups[0] for args in given]
        found = [
            {"options": args.flat(), "optimizer_options": group} for args, group in zip(given, groups, strict=True)
        ]
        labels = list(map(compare.label_of, found))
        assert len(set(labels)) == len(labels), labels


def made(label: str, seed: int = 0) -> dict[str, object]:
    return {"name": label, "options": {"model": "vit-digits", "dataset_name": "digits", "seed": seed}}


def test_an_optimizer_keeps_its_color() -> None:
    labels = ["AdamW", "32-bit Shampoo", "4-bit Shampoo", "4-bit Shampoo, naive", "SGD"]
    ours = "Shampoo4"
    every = {label: {0: made(label)} for label in [*labels, ours]}
    colors = dict(zip(every, side_by_side.colors_of(every), strict=True))
    assert len(set(colors.values())) == len(colors) and colors[ours] == plots.RED
    for chosen in (["AdamW", ours], [ours, "4-bit Shampoo"]):
        assert side_by_side.colors_of({label: every[label] for label in chosen}) == [colors[label] for label in chosen]


def test_the_picture_says_what_it_is_of() -> None:
    both = {label: {seed: made(label, seed) for seed in (0, 3)} for label in ("AdamW", "SGD")}
    assert side_by_side.heading(both) == "vit-digits on digits (mean and range of seeds 0, 3)"
    assert side_by_side.heading({"AdamW": {2: made("AdamW", 2)}}) == "vit-digits on digits (seed 2)"


def test_a_title_names_the_data_that_were_read() -> None:
    options = {"model": "vit-small", "dataset_name": "uoft-cs/cifar100", "seed": 3}
    for folder, name in (
        ({}, "uoft-cs/cifar100"),
        ({"dataset_path": "/data/copy/"}, "copy"),
        ({"train_dir": "birds/train", "dataset_path": None}, "birds/train"),
        ({"train_dir": "birds"}, "birds"),
        ({"train_dir": "."}, "."),
    ):
        results = {"options": {**options, **folder}, "deepspeed_optimizer": {"type": "AdamW"}}
        assert report.subject(results) == f"vit-small on {name}"
        assert report.title(results) == f"vit-small on {name}, AdamW of DeepSpeed's configuration, seed 3"


@pytest.mark.parametrize("given", [["--nothing"], ["/no/such/folder"], ["--output_dir", "/proc/no/such"]])
def test_an_expected_error_takes_two_lines(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(given)
    captured = capsys.readouterr()
    said = captured.out + captured.err + ("" if isinstance(ended.value.code, int) else f"{ended.value.code}\n")
    assert ended.value.code != 0 and 1 <= said.count("\n") <= 2, said
    assert given[-1] in said


def shown(runs: dict[str, dict[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> str:
    side_by_side.print_table(runs)
    return capsys.readouterr().out


def test_the_table_says_whose_state_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """The column "kept" is there with 32-bit Shampoo only, and bytes per parameter are those of all processes."""
    held = [{"preconditioner": 30, "base": 90}, {"preconditioner": 10, "base": 70}]
    run = {"train_loss": 1.0, "eval_accuracy": 0.5, "total_seconds": 1.0, "parameters": 40}
    alone = {**run, "state_bytes": held[0], "state_bytes_per_process": held[:1]}
    both = {**run, "state_bytes": held[0], "state_bytes_per_process": held}
    text = shown({"AdamW": {0: alone}, "Shampoo4": {0: alone}}, capsys)
    assert "all state" in text and "120 B" in text and "3.00" in text and "kept" not in text
    text = shown({"AdamW": {0: both}, "Shampoo4": {0: both}}, capsys)
    assert "all state" not in text and "state of a" in text and "of all" in text
    assert "120 B" in text and "200 B" in text and "5.00" in text
    runs = {label: {0: {**alone, "train_loss": loss}} for label, loss in (("AdamW", 2.0), ("32-bit Shampoo", 1.0))}
    assert "kept" in shown(runs, capsys)


def test_a_bar_has_the_color_of_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also AdamW's, which is all of the base; else the base's part is pale."""
    drawn = Drawn(monkeypatch, side_by_side)
    finish(tmp_path / "adamw", "--optimizer", "adamw", loss_steps=(10, 20))
    finish(tmp_path / "sgd", "--optimizer", "sgd", loss_steps=(10, 20))
    runs = compare.read_runs([tmp_path / "adamw", tmp_path / "sgd"])
    runs["SGD"][0]["state_bytes"] = {"base": 4, "preconditioner": 4}
    side_by_side.draw(runs, tmp_path / "x.png")
    panels = drawn.figure.axes
    lines = [line.get_color() for line in panels[0].get_lines()]
    assert lines == [plots.COLORS["adamw"], plots.COLORS["sgd"]]
    adamw, _, pale, full = (bar.get_facecolor() for bar in panels[3].patches)
    assert adamw == to_rgba(plots.COLORS["adamw"]) and full == to_rgba(plots.COLORS["sgd"]) and pale[3] < 1
    assert "pale: of its base" in panels[3].get_xlabel()


def test_a_mean_over_fewer_steps_is_left_out() -> None:
    logged = [{"step": step, "loss": 1.0} for step in (10, 20, 24, 34)]  # stopped at 24 and resumed
    lines = [*logged[:3], {"step": 24, "eval_loss": 1.0}, logged[3]]
    assert report.whole_intervals(lines) == [*logged[:2], lines[3], logged[3]]
    assert report.whole_intervals([logged[2]]) == [logged[2]] and report.whole_intervals([]) == []


@pytest.mark.parametrize("top", [1.02, 1.6, 2.9, 8.0, 30.0, 200.0, 5e3, 1e6])
@pytest.mark.parametrize("bottom", [0.0013, 1.2])
def test_logarithmic_axes_have_a_few_labels(tmp_path: Path, bottom: float, top: float) -> None:
    with plots.picture(tmp_path / "x.png") as (figure, panel):
        panel.plot([0, 1], [bottom, bottom * top])
        panel.set_yscale("log")
        plots.label_logarithms(panel.yaxis)
        figure.canvas.draw()
        low, high = panel.get_ylim()
        labels = [
            label.get_text()
            for minor in (False, True)
            for label, place in zip(panel.get_yticklabels(minor=minor), panel.get_yticks(minor=minor), strict=True)
            if low <= place <= high and label.get_text()
        ]
    assert 2 <= len(labels) <= 9 and len(set(labels)) == len(labels), labels
