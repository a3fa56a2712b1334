"""The training script: real runs on scikit-learn's digits, and its data functions alone."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from support import forked
from support.launching import losses, metrics, results, train, write_idx
from support.marks import slow_except

# isort: split
import train_vit  # found through launching, as the others are
from vit.args import parse_args
from vit.augment import BatchTransform, mix
from vit.data import EpochSampler, Images, Plan, encode_labels, make_loaders, natural_channels, to_pixels
from vit.model import build_config, decays
from vit.optim import parameter_groups
from vit.progress import Checkpoints, Progress
from vit.sources import ImageData, load_image_data

SHORT = ("--max_train_steps", 30, "--max_train_samples", 640, "--learning_rate", 3e-3, "--num_hidden_layers", 2)
OFTEN = ("--statistics_interval", 3)
WITH_ROOTS = (*OFTEN, "--root_interval", 6)
# 640 images, 32 per step: 20 steps an epoch. Step 33, the checkpoint, is in the middle of the second epoch and between
# two lines of the log. Flip, mixup and dropout all draw random numbers.
WITH_STOP = (
    *("--max_train_samples", 640, "--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 2),
    *("--max_train_steps", 47, "--logging_steps", 5, "--checkpointing_steps", 11, "--checkpoints_total_limit", 2),
    *("--augment", "flip", "--hidden_dropout_prob", 0.05, "--learning_rate", 3e-3, "--num_hidden_layers", 2),
)
LAUNCHED: dict[str, tuple[object, ...]] = {
    "shampoo4": ("--optimizer", "shampoo4", *OFTEN, *WITH_STOP, "--mixup", 0.1, "--with_tracking"),
    "adamw": ("--optimizer", "adamw", *WITH_STOP),
}
IN_PROCESS: dict[str, tuple[object, ...]] = {
    "shampoo32": (*WITH_ROOTS, *SHORT, "--decay_all", "--log_health"),
    "shampoo4-naive": (*WITH_ROOTS, *SHORT),
    "shampoo4-paper": (*WITH_ROOTS, *SHORT),
    "shampoo4-compact": (*OFTEN, *SHORT),
    "sgd": (*SHORT, "--max_train_steps", 60, "--learning_rate", 0.02),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a run's name to its folder and process. A run is made when it is first asked for."""
    base = tmp_path_factory.mktemp("runs")

    def launch(name: str) -> subprocess.CompletedProcess[str]:
        return train(base / name, *LAUNCHED[name], run=forked.run)

    def go_on(name: str) -> subprocess.CompletedProcess[str]:
        """Run again from the checkpoint, in a folder as a run leaves it that was killed while it saved."""
        full, folder = base / name, base / f"{name}-resumed"
        finished(name)
        shutil.copytree(full, folder)
        (folder / "checkpoint-44" / "complete.json").unlink()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 48, "lo')
        return train(folder, *LAUNCHED[name], "--resume_from_checkpoint", "latest", run=forked.run)

    @functools.cache
    def start(name: str) -> subprocess.CompletedProcess[str]:
        return launch(name) if name in LAUNCHED else go_on(name.removesuffix("-resumed"))

    def finished(name: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        process = start(name)
        assert process.returncode == 0, process.stderr[-3000:]
        return base / name, process

    return finished


@pytest.mark.parametrize("name", slow_except(["shampoo32"], IN_PROCESS))
def test_every_other_optimizer_trains(name: str, tmp_path: Path, one_process: None) -> None:
    train_vit.main(["--output_dir", str(tmp_path), "--optimizer", name, *map(str, IN_PROCESS[name])])
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.02
    held, estimates = results(tmp_path)["state_bytes"], results(tmp_path)["estimated_state_bytes"]
    assert 0 < held["base"] <= estimates["adamw"]["base"]
    if name == "shampoo32":
        assert held == estimates["float32"]
        told = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
        assert told[-1]["step"] == 30 and len(told[-1]["health"]) == 15  # 6 a layer, patches, positions, head
        query = told[-1]["health"]["vit.layers.0.attention.q_proj.weight"]
        assert query["orthogonality_error"] is None and query["failures"] == 0 < query["largest_eigenvalue"]
        assert (tmp_path / "health.png").stat().st_size > 10_000
    else:
        assert 5 * held["preconditioner"] < estimates["float32"]["preconditioner"]
        assert (held["preconditioner"] > 0) == name.startswith("shampoo4")


def test_what_a_run_leaves_behind(runs: Any) -> None:
    folder, process = runs("shampoo4")
    found = results(folder)
    assert found["steps"] == 47 and found["epochs"] == 2.35
    assert found["train_images"] == 640 and found["eval_images"] == 360
    assert 0 <= found["eval_accuracy"] <= found["best_eval_accuracy"] <= 1
    assert found["total_seconds"] > 0 and found["parameters"] > 60_000
    assert found["optimizer_options"]["method"] == "soap" and found["options"]["dataset_name"] == "digits"

    held, estimates = found["state_bytes"], found["estimated_state_bytes"]
    assert estimates["adamw"]["preconditioner"] == 0 < held["base"] < estimates["adamw"]["base"] / 20
    assert estimates["float32"]["base"] == held["base"]
    assert 0 < held["preconditioner"] < estimates["float32"]["preconditioner"] / 2
    assert results(runs("adamw")[0])["state_bytes"] == estimates["adamw"]

    lines = metrics(folder)
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 20, 25, 30, 35, 40, 40, 45, 47, 47]
    step_keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "optimizer_state_bytes"}
    assert all(line.keys() == step_keys for line in lines if "loss" in line)
    assert lines[4].keys() == lines[-1].keys() == {"step", "epoch", "eval_accuracy", "eval_loss"}
    assert lines[-2]["optimizer_state_bytes"] == held["preconditioner"] + held["base"]

    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "curves" in process.stdout and "AdamW alone" in process.stdout and "in float32" in process.stdout
    assert list(folder.glob("**/events.out.tfevents.*"))
    assert {path.name for path in (folder / "model").iterdir()} >= {"config.json", "model.safetensors"}
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-33", "checkpoint-44"}, "the limit is 2"


@pytest.mark.parametrize("name", slow_except(["shampoo4"], LAUNCHED))
def test_a_resumed_run_is_the_same_run(runs: Any, name: str) -> None:
    full, _ = runs(name)
    assert len(set(losses(full))) == len(losses(full)), "no two stretches of a training are alike"
    resumed, process = runs(f"{name}-resumed")
    assert "checkpoint-44 was never finished" in process.stderr
    assert f"Resumed from {resumed / 'checkpoint-33'}" in process.stderr
    assert metrics(resumed) == metrics(full)
    assert results(resumed)["train_loss"] == results(full)["train_loss"]
    weights, again = (load_file(folder / "model" / "model.safetensors") for folder in (full, resumed))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_checkpoints_of_another_run_are_kept_and_not_continued(tmp_path: Path, one_process: None) -> None:
    saved: list[str] = []
    accelerator: Any = SimpleNamespace(
        is_main_process=True,
        wait_for_everyone=lambda: None,
        save_state=lambda folder: (Path(folder).mkdir(), saved.append(folder)),
        load_state=saved.append,
    )

    def checkpoints(**options: object) -> Checkpoints:
        return Checkpoints(accelerator, tmp_path, 2, {"seed": 0, "learning_rate": 0.1, **options})

    for step in (2, 10, 9):
        checkpoints().save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    (tmp_path / "checkpoint-11").mkdir()
    checkpoints(learning_rate=0.2).begin("latest", overwrite=False)
    assert saved[-1] == str(tmp_path / "checkpoint-10"), "by the number of the step; 11 was never finished"
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        checkpoints(seed=1).begin("latest", overwrite=False)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoints().begin(str(tmp_path / "checkpoint-11"), overwrite=False)
    with pytest.raises(ValueError, match="holds checkpoints of a run"):
        checkpoints().begin(None, overwrite=False)
    assert len(list(tmp_path.iterdir())) == 3
    checkpoints().begin(None, overwrite=True)
    checkpoints().begin("latest", overwrite=False)  # nothing there: starts at 0, so that a queue can always say latest
    assert not list(tmp_path.iterdir()) and len(saved) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimzer", "adamw"], "--optimzer"),
        (["--learning", "1"], "--learning"),  # no abbreviations
        (["--max_train_steps", "0"], "at least 1"),
        (["--optimizer", "shampoo32", "--bits", "4"], "contradicts"),
        (["--model", "vit-tiny", "--model_name_or_path", "x"], "not both"),
        (["--train_dir", "x", "--dataset_name", "digits"], "--train_dir"),
        (["--checkpointing_steps", "0"], "at least 1"),
        (["--root", "square"], "invalid choice: 'square'"),
    ],
)
def test_a_wrong_command_line_fails(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert message in capsys.readouterr().err


def test_defaults_follow_the_data_set() -> None:
    args = parse_args([])
    assert (args.model.model, args.data.augment, args.data.dataset_name) == ("vit-digits", "none", "digits")
    assert parse_args(["--dataset_name", "cifar10"]).data.augment == "flip-crop"
    assert parse_args(["--dataset_name", "cifar10", "--augment", "none"]).data.augment == "none"
    assert parse_args(["--model_name_or_path", "x"]).model.model is None
    base = "--shampoo_base sgd"
    for flags in ("--optimizer sgd", f"{base} --method shampoo", f"{base} --preset paper"):
        assert parse_args(flags.split()).training.learning_rate == 0.1
    for flags in ("", base, f"{base} --optimizer shampoo4-compact"):  # method="soap"
        assert parse_args(flags.split()).training.learning_rate == 1e-3


def test_options_of_shampoo_are_what_the_name_means_and_what_is_given() -> None:
    assert parse_args([]).shampoo == {}
    paper = {"method": "shampoo", "statistics_interval": 10, "root_interval": 50}
    assert parse_args(["--optimizer", "shampoo4-paper"]).shampoo == paper
    often = parse_args(["--method", "shampoo", "--statistics_interval", "7"]).shampoo
    assert often == {**paper, "statistics_interval": 7}
    flags = [
        "--optimizer",
        "shampoo4-compact",
        "--bits",
        "8",
        "--interval_warmup",
        "false",
        "--rectify_steps",
        "0",
        "2",
    ]
    given = {"bits": 8, "interval_warmup": False, "rectify_steps": [0, 2]}
    assert parse_args(flags).shampoo == {"preset": "compact", **given}
    assert parse_args(["--preset", "paper", "--root_interval", "7"]).shampoo == {"preset": "paper", "root_interval": 7}
    assert parse_args(["--method", "soap", "--bits", "4"]).shampoo == {"method": "soap", "bits": 4}


def test_digits_are_split_by_class() -> None:
    data = load_image_data(parse_args(["--max_eval_samples", "100"]).data)
    assert (len(data.train), len(data.validation)) == (1437, 100)
    assert natural_channels(data) == 1
    counts = np.bincount(data.train["label"][:])
    assert counts.min() >= 139 and counts.max() <= 147
    images = Images(data.train, data, 8, 1, 1e9)
    assert images.decoded is not None and images.decoded.dtype == torch.uint8 and images.decoded.max() == 255
    mean, std = images.statistics()
    pixels = images.decoded.double() / 255
    assert mean == pytest.approx([pixels.mean().item()])
    assert std == pytest.approx([pixels.std(correction=0).item()])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_idx_files(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
    for prefix, count in (("train", 12), ("t10k", 5)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images[:count])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels[:count])
    data = load_image_data(parse_args(["--dataset_name", "fashion-mnist", "--dataset_path", str(tmp_path)]).data)
    assert data.label_names[:2] == ["T-shirt/top", "Trouser"] and len(data.validation) == 5
    decoded = Images(data.train, data, 28, 1, 1e9)
    assert np.array_equal(decoded.decoded, images[:, None])
    assert decoded.labels.tolist() == labels.tolist()
    first = load_image_data(parse_args(["--dataset_path", str(tmp_path), "--max_train_samples", "3"]).data)
    assert first.train["label"][:] == [0, 1, 2]

    (tmp_path / f"train-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        load_image_data(parse_args(["--dataset_path", str(tmp_path)]).data)


def test_fashion_mnist_missing_tells_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("vit.sources.FASHION_FOLDER", str(tmp_path / "nothing"))
    monkeypatch.setattr("vit.sources.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as caught:
        load_image_data(parse_args(["--dataset_name", "fashion-mnist"]).data)
    assert "apt-get download" in str(caught.value) and "no network" in str(caught.value)


def test_image_folder_and_stored_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    colors = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for (name, color), index in itertools.product(colors.items(), range(5)):
        path = tmp_path / "photos" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + index, 10), color).save(path)
    data = load_image_data(parse_args(["--train_dir", str(tmp_path / "photos")]).data)
    assert data.label_names == ["blue", "red"] and natural_channels(data) == 3
    assert (len(data.train), sorted(data.validation["label"][:])) == (8, [0, 1])

    decoded, encoded = (Images(data.train, data, 8, 3, cache) for cache in (1e9, 0))
    assert decoded.decoded is not None and encoded.decoded is None
    for index, label in enumerate(decoded.labels.tolist()):
        pixels = decoded.decoded[index]
        assert pixels.shape == (3, 8, 8) and pixels[2 - 2 * label].eq(255).all() and pixels[1].eq(0).all()
    batch = encoded.__getitems__([5, 1])
    assert torch.equal(batch["pixel_values"], decoded.decoded[[5, 1]])
    assert torch.equal(batch["labels"], decoded.labels[[5, 1]])

    stored = tmp_path / "stored"
    DatasetDict({"train": data.train, "test": data.validation}).save_to_disk(stored)
    again = load_image_data(parse_args(["--dataset_path", str(stored)]).data)
    assert (len(again.train), len(again.validation)) == (8, 2)
    with pytest.raises(ValueError, match="--label_column_name fine: the data set has no such column"):
        load_image_data(parse_args(["--dataset_path", str(stored), "--label_column_name", "fine"]).data)
    with pytest.raises(FileNotFoundError, match="save_to_disk"):
        load_image_data(parse_args(["--dataset_path", str(tmp_path)]).data)


def test_labels_may_be_words_and_must_be_known() -> None:
    rows = Dataset.from_dict({"label": ["cat", "ant", "cat"]})
    assert encode_labels(rows, "label", ["ant", "cat"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"labels \['cat'\] of column 'label' are none of the 1 classes"):
        encode_labels(rows, "label", ["ant"])
    with pytest.raises(ValueError, match="without labels"):
        encode_labels(Dataset.from_dict({"label": [-1, -1]}), "label", ["ant"])


def test_images_keep_their_middle() -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 200
    image = Image.fromarray(pixels)
    assert torch.equal(to_pixels(image, 8, 1), torch.full((1, 8, 8), 200, dtype=torch.uint8))
    assert to_pixels(image, 4, 3).shape == (3, 4, 4)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, *span: int) -> list[int]:
        sampler = EpochSampler(50, seed)
        sampler.start(*span)
        assert len(sampler) == span[2] - span[1]
        return list(sampler)

    whole = order(3, 1, 0, 50)
    assert sorted(whole) == list(range(50))
    assert order(3, 1, 20, 40) == whole[20:40]
    assert order(3, 2, 0, 50) != whole != order(4, 1, 0, 50)


def test_every_step_has_the_same_number_of_images() -> None:
    flags = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "3", "--max_train_steps", "7"]
    args = parse_args(flags).training
    plan = Plan.make(args, images=100, processes=2)
    assert (plan.step_images, plan.epoch_steps, plan.epochs) == (48, 2, 4)
    assert [plan.last_step(epoch) for epoch in range(4)] == [2, 4, 6, 7]
    with pytest.raises(ValueError, match="fewer than the 48 of one step"):
        Plan.make(args, images=47, processes=2)


def test_a_loader_gives_whole_batches_and_leaves_the_random_numbers_alone() -> None:
    rows = Dataset.from_dict({"image": [Image.new("L", (1, 1), n) for n in range(10)], "label": list(range(10))})
    images = Images(rows, ImageData(rows, rows, "image", "label", list(map(str, range(10)))), 1, 1, 1e9)
    args = parse_args(["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"])
    train_loader, eval_loader, sampler = make_loaders(args, images, images)
    sampler.start(0, 0, 8)
    before = torch.get_rng_state()
    batches = list(train_loader)
    assert [len(batch["labels"]) for batch in batches] == [4, 4]
    assert all(torch.equal(batch["pixel_values"].flatten(), batch["labels"].byte()) for batch in batches)
    assert torch.cat([batch["labels"] for batch in eval_loader]).tolist() == list(range(10))
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_is_augmented_in_training_only() -> None:
    options = {"image_size": 8, "num_labels": 4, "augment": "flip-crop", "crop_padding": 2, "mixup": 0.5}
    transform = BatchTransform([0.5], [0.25], **options)  # type: ignore[arg-type]
    batch = {"pixel_values": torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8), "labels": torch.arange(16) % 4}
    images, labels = transform.eval()(batch)
    assert torch.allclose(images, (batch["pixel_values"] / 255 - 0.5) / 0.25)
    assert torch.equal(labels, batch["labels"])
    torch.manual_seed(1)
    images, targets = transform.train()(batch)
    torch.manual_seed(1)
    again, _ = transform(batch)
    assert images.shape == (16, 1, 8, 8) and torch.equal(images, again)
    assert targets.shape == (16, 4) and torch.allclose(targets.sum(1), torch.ones(16))
    mixed, shares = mix(torch.eye(4).view(4, 1, 2, 2), torch.arange(4), 4, 1.0)
    assert torch.allclose(mixed.flatten(1), shares), "an image and its target are mixed in the same shares"


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    accelerator: Any = SimpleNamespace(gather=lambda value: value, num_processes=1)
    progress = Progress(step=2)
    losses = list(torch.tensor([1.0, 3.0, 5.0, 6.0]))
    progress.collect(losses, 2, accelerator)
    assert progress.epoch_losses == progress.unlogged_losses == [2.0, 5.5] and losses == []
    progress.step = 5
    with pytest.raises(FloatingPointError, match="step 4 is nan"):
        progress.collect(list(torch.tensor([1.0, 1.0, 1.0, float("nan"), 1.0, 1.0])), 2, accelerator)


def test_sizes_of_the_models_and_who_decays() -> None:
    from transformers import AutoModelForImageClassification

    def parameters(*flags: str) -> tuple[torch.nn.Module, int]:
        config = build_config(parse_args(flags).model, [str(i) for i in range(1000)], 3)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        return model, sum(parameter.numel() for parameter in model.parameters())

    # As published, in millions: ViT-Ti 5.7, ViT-S 22, ViT-B 86, Swin-T 28 and 29 for 1000 classes.
    for name, millions in {"vit-tiny": 5.7, "vit-small": 22.1, "vit-base": 86.6, "swin-tiny": 28.3}.items():
        model, count = parameters("--model", name)
        assert count / 1e6 == pytest.approx(millions, abs=0.06)
    names = decays(model)
    groups = parameter_groups(model, 0.05, decay_all=False)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {name for name, _ in groups[0]["params"]} == names
    assert not any("norm" in name or "bias" in name or "position" in name for name in names)
    assert len(parameter_groups(model, 0.05, decay_all=True)) == 1
    with pytest.raises(ValueError, match="--embed_dim cannot be set for --model vit-tiny"):
        parameters("--model", "vit-tiny", "--embed_dim", "8")
