"""Sources of images. Each becomes a Hugging Face data set with a column of images and one of labels."""

from __future__ import annotations

import glob
import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

if TYPE_CHECKING:
    from vit.args import DataArguments

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
_SPLIT_SEED = 0  # not --seed: runs with different seeds are evaluated on the same images


@dataclass(frozen=True)
class ImageData:
    """Training and evaluation rows, the columns of images and labels, and the classes in the order of indices."""

    train: Dataset
    validation: Dataset
    image_column: str
    label_column: str
    label_names: list[str]


def load_image_data(args: DataArguments) -> ImageData:
    """Load the data set that the options name, or N rows of it: the first ones, or random ones of folders."""
    splits = _load_splits(args)
    train = _split(splits, "train")
    image = args.image_column_name or _find_image_column(train)
    label = args.label_column_name or _find_label_column(train)
    for option, column in (("--image_column_name", image), ("--label_column_name", label)):
        if column not in train.column_names:
            raise ValueError(f"{option} {column}: the data set has no such column, only {train.column_names}")
    feature = train.features[label]
    names = feature.names if isinstance(feature, ClassLabel) else list(map(str, sorted(set(train[label][:]))))

    evaluation = args.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    if evaluation is not None:
        validation = _split(splits, evaluation)
    else:
        train, validation = _hold_out(train, label, args.train_val_split)
    shuffled = args.train_dir is not None  # rows of folders are in the order of their classes
    train = _limit(train, args.max_train_samples, shuffled)
    validation = _limit(validation, args.max_eval_samples, shuffled)
    return ImageData(train, validation, image, label, names)


def _limit(rows: Dataset, count: int | None, shuffled: bool) -> Dataset:
    """Take ``count`` rows: the first ones, or random ones, which are always the same."""
    if count is None or count >= len(rows):
        return rows
    return (rows.shuffle(seed=_SPLIT_SEED) if shuffled else rows).select(range(count))


def _load_splits(args: DataArguments) -> DatasetDict:
    if args.train_dir:
        files = {}
        for split, option, folder in (
            ("train", "--train_dir", args.train_dir),
            ("validation", "--validation_dir", args.validation_dir),
        ):
            if folder:
                _check_folder(option, Path(folder))
                files[split] = f"{glob.escape(str(Path(folder).resolve()))}/**"
        return load_dataset("imagefolder", data_files=files, drop_labels=False)
    if args.dataset_name == "fashion-mnist":
        return _load_fashion(args.dataset_path)
    if args.dataset_path:
        return _load_path(Path(args.dataset_path))
    if args.dataset_name == "digits":
        return _load_digits()
    splits = _load_hub(args.dataset_name, args.dataset_config_name)
    if not isinstance(splits, DatasetDict):
        raise ValueError(f"--dataset_name {args.dataset_name} is streamed or has no splits; a plain data set is needed")
    return splits


def _load_hub(name: str, config: str | None) -> object:
    try:
        return load_dataset(name, config)
    except Exception as error:  # no network, no such data set, no access: each has a type of its own
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"--dataset_name {name} cannot be loaded from the hub: {said}") from error


def _check_folder(option: str, root: Path) -> None:
    """Check that images lie in folders of classes, where alone their labels are known.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: an image lies elsewhere.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{option} {root}: there is no such folder")
    empty = True
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # as datasets leaves them out
        image = next((name for name in files if _is_image(name)), None)
        if image is None:
            continue
        empty = False
        path = Path(place, image)
        if len(path.relative_to(root).parts) != 2:
            raise ValueError(
                f"{option} {root}: {path} does not lie in the folder of a class; images must lie exactly one level "
                f"below, as in {root / 'CLASS' / image}{_advice(root)}"
            )
    if empty:
        raise FileNotFoundError(f"{option} {root} has no images in sub-folders")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS


def _advice(root: Path) -> str:
    """Name the flags for a folder of splits."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = folders.get("train")
    evaluation = next((folders[name] for name in ("validation", "val", "valid", "test") if name in folders), None)
    flags = [
        f"{flag} {folder}" for flag, folder in (("--train_dir", train), ("--validation_dir", evaluation)) if folder
    ]
    return f". For these splits give {' '.join(flags)}" if flags else ""


def _load_digits() -> DatasetDict:
    """Load scikit-learn's 1,797 gray images of 8x8, in 17 gray levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return DatasetDict({"train": _from_arrays(gray, digits.target, [str(name) for name in digits.target_names])})


def _load_fashion(folder: str | None) -> DatasetDict:
    """Load Fashion-MNIST from idx files, or from the hub if the default folder is missing."""
    if folder is not None or Path(FASHION_FOLDER).is_dir():
        return _load_idx(Path(folder or FASHION_FOLDER), FASHION_CLASSES)
    try:
        return load_dataset("zalando-datasets/fashion_mnist")
    except Exception as error:  # offline, behind a proxy, renamed: the remedy is the same
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {FASHION_FOLDER} and cannot be loaded from the hub.\n"
            "On Debian or Ubuntu:  apt-get install dataset-fashion-mnist\n"
            "or, without root:     apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb DIR\n"
            "                      and add  --dataset_path DIR/usr/share/datasets/fashion-mnist\n"
            f"The hub said: {type(error).__name__}: {error}"
        ) from error


def _load_path(folder: Path) -> DatasetDict:
    """Load a folder that save_to_disk has written, or one of idx files like MNIST's."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        stored = load_from_disk(str(folder))
        return stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
    if list(folder.glob("train-images-idx3-ubyte*")):
        return _load_idx(folder, None)
    raise FileNotFoundError(
        f"--dataset_path {folder} holds neither a data set stored by save_to_disk nor idx files "
        "(train-images-idx3-ubyte[.gz], ...); for image files in folders use --train_dir"
    )


def _load_idx(folder: Path, label_names: list[str] | None) -> DatasetDict:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in the {split} split")
        names = label_names or [str(label) for label in range(int(labels.max()) + 1)]
        splits[split] = _from_arrays(images, labels, names)
    return DatasetDict(splits)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file: zero bytes, type 8, the number of dimensions, each size as a big-endian word, the data."""
    zipped, plain = folder / f"{name}.gz", folder / name
    if not zipped.exists() and not plain.exists():
        raise FileNotFoundError(f"{folder} has no {name}.gz and no {name}")
    data = gzip.decompress(zipped.read_bytes()) if zipped.exists() else plain.read_bytes()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} in {folder} is not an idx file of bytes")
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


def _from_arrays(images: np.ndarray, labels: np.ndarray, label_names: list[str]) -> Dataset:
    # Not Image, which would encode each of 70,000 images as a PNG.
    features = Features({"image": Array2D(images.shape[1:], "uint8"), "label": ClassLabel(names=label_names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def _split(splits: DatasetDict, name: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"the data set has no split {name!r}, only {list(splits)}")
    return splits[name]


def _hold_out(rows: Dataset, label_column: str, share: float) -> tuple[Dataset, Dataset]:
    """Split the rows at random, with the same proportions of classes.

    Raises:
        ValueError: a class has too few images.
    """
    from sklearn.model_selection import train_test_split

    labels = np.asarray(rows[label_column][:])
    classes, counts = np.unique(labels, return_counts=True)
    held_rows = math.ceil(share * len(labels))
    if min(counts) < 2 or min(held_rows, len(labels) - held_rows) < len(classes):
        feature, rarest = rows.features[label_column], classes[counts.argmin()].item()
        name = feature.int2str(rarest) if isinstance(feature, ClassLabel) and rarest >= 0 else rarest
        raise ValueError(
            f"class {name!r} has only {min(counts)} image(s): too few to hold out a share of {share} of "
            f"{len(labels)} images in {len(classes)} classes with some of each class on both sides. Give "
            "evaluation images by --validation_dir or --validation_split, or another --train_val_split"
        )
    kept, held = train_test_split(np.arange(len(rows)), test_size=share, stratify=labels, random_state=_SPLIT_SEED)
    return rows.select(kept), rows.select(held)


def _find_image_column(rows: Dataset) -> str:
    for name, feature in rows.features.items():
        if isinstance(feature, (Image, Array2D)):
            return name
    raise ValueError(f"no column holds images among {rows.column_names}: name it by --image_column_name")


def _find_label_column(rows: Dataset) -> str:
    classes = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    for name in ("label", "labels", *(classes if len(classes) == 1 else ())):
        if name in rows.column_names:
            return name
    raise ValueError(f"cannot tell the label column among {rows.column_names}: name it by --label_column_name")
