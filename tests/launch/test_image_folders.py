"""Images of train_vit.py: folders, modes and broken files, and options that fail at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from support import forked
from support.launching import LAUNCH, train

# isort: split
from vit.args import SCHEDULES, parse_args  # found through launching, as the others are
from vit.data import Images, natural_channels, spread_rows, to_pixels
from vit.sources import ImageData, load_image_data

Load = Callable[..., ImageData]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A function from flags to their data, with a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda *flags: load_image_data(parse_args(list(map(str, flags))).data)


def write_images(root: Path, classes: str = "abc", each: int = 6, mode: str = "RGB") -> Path:
    """Write images of one level a class: 40, 80, 120, and so on."""
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            Image.new("L", (5, 4), 40 * (place + 1)).convert(mode).save(root / name / f"{index}.png")
    return root


def gray(values: list[int], kind: str) -> Image.Image:
    return Image.fromarray(np.array([values], kind))


def kept(data: ImageData, channels: int = 3, cache: float = 1e9) -> Images:
    return Images(data.train, data, 2, channels, cache)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_sixteen_bits_become_eight(kind: str) -> None:
    image = gray([0, 0x12FF, 0x8000, 0xFFFF], kind)
    assert image.mode in ("I", "I;16", "I;16B")
    assert to_pixels(image.crop((1, 0, 2, 1)), 1, 1).tolist() == [[[0x12]]]
    assert to_pixels(image.crop((2, 0, 3, 1)), 1, 3).flatten().tolist() == [0x80] * 3
    assert to_pixels(image.crop((3, 0, 4, 1)), 1, 1).item() == 0xFF


def test_other_ranges_are_kept_or_refused() -> None:
    assert to_pixels(gray([200], "<i4"), 1, 1).item() == 200, "these are 8 bits in a wide mode"
    for image, said in (
        (Image.new("F", (2, 2)), "mode F is not supported: convert the images to mode L or RGB"),
        (gray([70_000], "<i4"), "convert the images to 16 bits, 0 to 65535, or to mode L"),
        (gray([-1], "<i4"), "values go from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=said):
            to_pixels(image, 1, 1)


def in_memory(images: list[Image.Image]) -> ImageData:
    rows = Dataset.from_dict({"image": images, "label": [0] * len(images)})
    rows = rows.cast_column("image", ImageColumn())
    return ImageData(rows, rows, "image", "label", ["0"])


def test_one_channel_only_if_all_images_are_gray() -> None:
    deep = [gray([1, 500], kind) for kind in ("<u2", ">u2", "<i4")]
    assert natural_channels(in_memory([*deep, Image.new("L", (2, 2))])) == 1
    assert natural_channels(in_memory([Image.new("L", (2, 2))] * 99 + [Image.new("RGB", (2, 2))])) == 3


def test_rows_are_spread_evenly() -> None:
    assert spread_rows(9, 3) == [0, 4, 8] and spread_rows(3, 64) == [0, 1, 2] and spread_rows(1, 1) == [0]
    assert len(set(spread_rows(3_000_001, 2048))) == 2048 and spread_rows(3_000_001, 2048)[-1] == 3_000_000


def test_statistics_are_of_all_classes() -> None:
    """Of rows in the order of classes, as those of folders are, and more than are looked at."""
    levels = np.repeat(np.array([40, 80, 120], np.uint8), 1500)
    features = Features({"image": Array2D((1, 1), "uint8"), "label": Value("int64")})
    rows = Dataset.from_dict({"image": levels[:, None, None], "label": [0] * len(levels)}, features=features)
    data = ImageData(rows, rows, "image", "label", ["0"])
    for cache in (0, 1e9):
        mean, std = Images(rows, data, 1, 1, cache).statistics()
        assert mean == pytest.approx([80 / 255], rel=1e-3)
        assert std == pytest.approx([np.std([40, 80, 120]) / 255], rel=1e-3)


def test_some_images_of_folders_are_of_all_classes(tmp_path: Path, load: Load) -> None:
    folders = ("--train_dir", write_images(tmp_path / "t"), "--validation_dir", write_images(tmp_path / "v"))
    limits = ("--max_train_samples", 9, "--max_eval_samples", 8)
    data, again = load(*folders, *limits), load(*folders, *limits)
    assert (len(data.train), len(data.validation)) == (9, 8)
    assert set(data.train["label"][:]) == set(data.validation["label"][:]) == {0, 1, 2}
    assert data.train["image"][:] == again.train["image"][:]
    assert load(*folders, "--max_train_samples", 99).train["label"][:] == [0] * 6 + [1] * 6 + [2] * 6


def test_the_first_rows_of_a_stored_data_set_are_taken(tmp_path: Path, load: Load) -> None:
    train = in_memory([Image.new("L", (2, 2))] * 5).train
    rows = train.remove_columns("label").add_column("label", [0, 1, 2, 3, 4])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "stored")
    data = load("--dataset_path", tmp_path / "stored", "--max_train_samples", 3, "--max_eval_samples", 2)
    assert (data.train["label"][:], data.validation["label"][:]) == ([0, 1, 2], [0, 1])


@pytest.mark.parametrize("evaluation", ["validation", "val", "test"])
def test_the_root_of_splits_is_refused(evaluation: str, tmp_path: Path, load: Load) -> None:
    train, held = write_images(tmp_path / "train"), write_images(tmp_path / evaluation)
    for flags in (("--train_dir", tmp_path), ("--train_dir", train, "--validation_dir", tmp_path)):
        with pytest.raises(ValueError, match="exactly one level below") as caught:
            load(*flags)
        assert f"give --train_dir {train} --validation_dir {held}" in str(caught.value)
        assert ".png does not lie in the folder of a class" in str(caught.value)


@pytest.mark.parametrize("place", ["cover.PNG", "a/sub/0.png"])
def test_an_image_outside_of_the_classes_is_named(place: str, tmp_path: Path, load: Load) -> None:
    root = write_images(tmp_path / "photos")
    (root / "__macosx" / "x").mkdir(parents=True)
    for hidden in ("notes.txt", "a/.0.png", "__macosx/x/0.png"):  # what datasets leaves out
        (root / hidden).write_bytes((root / "a" / "0.png").read_bytes())
    assert load("--train_dir", root).label_names == ["a", "b", "c"]
    (root / place).parent.mkdir(exist_ok=True)
    (root / "b" / "0.png").rename(root / place)
    with pytest.raises(ValueError, match="exactly one level below") as caught:
        load("--train_dir", root)
    assert str(root / place) in str(caught.value) and "splits" not in str(caught.value)


def test_classes_may_have_the_names_of_splits(tmp_path: Path, load: Load) -> None:
    root = tmp_path / "photos"
    for name in ("train", "test"):
        write_images(tmp_path / name, "x")
        (root / name).parent.mkdir(exist_ok=True)
        (tmp_path / name / "x").rename(root / name)
    assert load("--train_dir", root).label_names == ["test", "train"]


def test_folders_are_found_or_said_to_be_missing(tmp_path: Path, load: Load) -> None:
    odd = write_images(tmp_path / "photos [1]*?")
    assert load("--train_dir", odd).label_names == ["a", "b", "c"]
    (tmp_path / "empty" / "a").mkdir(parents=True)
    for flags, said in (
        (("--train_dir", tmp_path / "none"), f"--train_dir {tmp_path / 'none'}: there is no such folder"),
        (("--train_dir", odd, "--validation_dir", tmp_path / "none"), "--validation_dir"),
        (("--train_dir", tmp_path / "empty"), "has no images in sub-folders"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            load(*flags)
        assert said in str(caught.value)


def test_the_script_says_what_is_missing_in_a_line(tmp_path: Path) -> None:
    """Folders, data sets of the hub, here without a network, and flags."""
    for flags, said in (
        (("--train_dir", tmp_path / "none"), "there is no such folder"),
        (("--dataset_name", "nobody/nothing"), "--dataset_name nobody/nothing cannot be loaded from the hub: "),
        (("--model_name_or_path", tmp_path / "none"), "none"),
    ):
        ended = train(tmp_path / "run", *flags, run=forked.run)
        assert ended.returncode == 1 and ended.stderr.startswith("train_vit.py: error: "), ended.stderr
        assert said in ended.stderr and "Traceback" not in ended.stderr and ended.stderr.count("\n") <= 3, ended.stderr


@pytest.mark.parametrize("cache", [1e9, 0])
def test_a_truncated_image_is_named_by_its_file(cache: float, tmp_path: Path, load: Load) -> None:
    root = write_images(tmp_path / "t")
    data = load("--train_dir", root, "--validation_dir", write_images(tmp_path / "v"))
    broken = root / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"image {broken} cannot be read: "):
        kept(data, cache=cache).statistics()
    Image.new("F", (2, 2)).save(broken, "tiff")
    with pytest.raises(ValueError, match=f"image {broken}: mode F"):
        kept(data, cache=cache).statistics()


def test_a_truncated_image_is_named_by_its_row() -> None:
    rows = in_memory([Image.new("L", (2, 2))] * 6).train.cast_column("image", ImageColumn(decode=False))
    stored = [
        {"bytes": row["bytes"][: 20 if place == 4 else None], "path": None} for place, row in enumerate(rows["image"])
    ]
    features = Features({"image": ImageColumn(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": stored, "label": [0] * 6}, features=features)
    data = ImageData(rows, rows, "image", "label", ["0"])
    with pytest.raises(ValueError, match="image row 4 cannot be read"):
        kept(data)
    with pytest.raises(ValueError, match="image row 4 cannot be read"):
        kept(data, cache=0).__getitems__([3, 4])
    split = rows.select([5, 4, 0])  # row 4 of the data set, whatever its place in a split
    with pytest.raises(ValueError, match="image row 4 cannot be read"):
        Images(split, data, 2, 1, 0).__getitems__([1])


def test_rows_are_decoded_as_they_are_asked_for(tmp_path: Path, load: Load) -> None:
    data = load("--train_dir", write_images(tmp_path / "t"), "--validation_dir", write_images(tmp_path / "v"))
    every = kept(data)
    assert every.decoded is not None and every.decoded[:, 0, 0, 0].tolist() == [40] * 6 + [80] * 6 + [120] * 6
    assert torch.equal(kept(data, cache=0).__getitems__([17, 0, 7])["pixel_values"], every.decoded[[17, 0, 7]])


def test_a_class_too_small_to_split_is_named(tmp_path: Path, load: Load) -> None:
    root = write_images(tmp_path / "rare")
    for index in range(1, 6):
        (root / "c" / f"{index}.png").unlink()
    few = write_images(tmp_path / "few", each=2)  # 20 % are 2 images of 3 classes
    for folder, said in ((root, r"class 'c' has only 1 image\(s\)"), (few, r"class 'a' has only 2 image\(s\)")):
        with pytest.raises(ValueError, match=f"{said}.*--validation_dir"):
            load("--train_dir", folder)
    assert len(load("--train_dir", few, "--train_val_split", 0.5).train) == 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_offered_can_be_made(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    assert parse_args(["--lr_scheduler_type", name]).training.lr_scheduler_type == name
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr_scheduler_type warmup_stable_decay", "invalid choice"),
        ("--lr_scheduler_type cosine_with_min_lr", "invalid choice"),
        ("--lr_scheduler_type cosine_warmup_with_min_lr", "invalid choice"),
        ("--warmup_ratio 1.5", "--warmup_ratio must be between 0 and 1, got 1.5"),
        ("--warmup_ratio -0.1", "--warmup_ratio must be between 0 and 1"),
        ("--warmup_ratio nan", "--warmup_ratio must be between 0 and 1"),
        ("--num_warmup_steps -1", "--num_warmup_steps must be at least 0"),
        ("--mixup -0.2", "--mixup must be at least 0"),
        ("--max_grad_norm -1", "--max_grad_norm must be at least 0"),
        ("--crop_padding -4", "--crop_padding must be at least 0"),
        ("--seed -1", "--seed must be at least 0"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert said in capsys.readouterr().err


def test_the_ends_of_ranges_are_allowed() -> None:
    names = ("warmup_ratio", "num_warmup_steps", "mixup", "max_grad_norm", "crop_padding", "seed")
    found = parse_args([word for name in names for word in (f"--{name}", "0")]).flat()
    assert [found[name] for name in names] == [0] * 6
    assert parse_args(["--warmup_ratio", "1", "--local_rank", "-1"]).training.warmup_ratio == 1


def test_options_that_an_optimizer_does_not_use_are_named() -> None:
    for flags, unused in (
        ("--optimizer adamw --bits 4 --root implicit", "--optimizer adamw does not use --bits, --root"),
        ("--preset paper --optimizer sgd --shampoo_base sgd", "--optimizer sgd does not use --preset, --shampoo_base"),
    ):
        with pytest.warns(UserWarning, match=f"^{unused}$"):
            parse_args(flags.split())
    recipe = str(LAUNCH / "recipes" / "cifar100-vit-small.yaml")  # it has a preset, for other optimizers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_args(["--recipe", recipe, "--optimizer", "adamw"])
        parse_args(["--optimizer", "shampoo4", "--bits", "4", "--shampoo_base", "sgd"])
