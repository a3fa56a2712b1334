"""Where images come from: each source ends as a Hugging Face data set with an image and a label column."""

from __future__ import annotations

import argparse
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
_SPLIT_SEED = 0  # apart from --seed, so that runs with different seeds are judged on the same images
_ARRAYS = ("Array2D", "Array3D")


@dataclass(frozen=True)
class ImageData:
    """Training and evaluation rows, where their images and labels stand, and the classes in index order."""

    train: Dataset
    validation: Dataset
    image_column: str
    label_column: str
    label_names: list[str]


def load_image_data(args: argparse.Namespace) -> ImageData:
    """The data set that the command line names, cut to the first N rows where asked."""
    splits = _load_splits(args)
    train = _split(splits, args.train_split)
    image_column = args.image_column_name or _find_image_column(train)
    label_column = args.label_column_name or _find_label_column(train)
    for option, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
        if column not in train.column_names:
            raise ValueError(f"{option} {column}: the data set has no such column, only {train.column_names}")
    label_names = _label_names(train, label_column)

    name = args.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    if name is not None:
        validation = _split(splits, name)
    else:
        train, validation = _hold_out(train, label_column, args.train_val_split)
    if args.max_train_samples:
        train = train.select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples:
        validation = validation.select(range(min(args.max_eval_samples, len(validation))))
    return ImageData(train, validation, image_column, label_column, label_names)


def _load_splits(args: argparse.Namespace) -> DatasetDict:
    if args.train_dir:
        return _load_folders(args.train_dir, args.validation_dir)
    if args.dataset_name == "fashion-mnist":
        return _load_fashion(args.dataset_path)
    if args.dataset_path:
        return _load_path(Path(args.dataset_path))
    if args.dataset_name == "digits":
        return _load_digits()
    splits = load_dataset(args.dataset_name, args.dataset_config_name)
    if not isinstance(splits, DatasetDict):
        raise ValueError(f"--dataset_name {args.dataset_name} is streamed or has no splits; a plain data set is needed")
    return splits


def _load_digits() -> DatasetDict:
    """1,797 grey images of 8x8, in 17 grey levels, from scikit-learn's own files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return DatasetDict({"train": _from_arrays(grey, digits.target, [str(name) for name in digits.target_names])})


def _load_fashion(folder: str | None) -> DatasetDict:
    """Fashion-MNIST from idx files; from the hub where the default folder is missing."""
    if folder is not None or Path(FASHION_FOLDER).is_dir():
        return _load_idx(Path(folder or FASHION_FOLDER), FASHION_CLASSES)
    try:
        return load_dataset("zalando-datasets/fashion_mnist")
    except Exception as error:  # offline, behind a proxy, renamed: whatever it is, the remedy is the same
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in {FASHION_FOLDER} nor to be had from the hub.\n"
            "On Debian or Ubuntu:  apt-get install dataset-fashion-mnist\n"
            "or, without root:     apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb DIR\n"
            "                      and add  --dataset_path DIR/usr/share/datasets/fashion-mnist\n"
            f"The hub said: {type(error).__name__}: {error}"
        ) from error


def _load_path(folder: Path) -> DatasetDict:
    """A folder by its content: stored by save_to_disk, or idx files as MNIST's."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        stored = load_from_disk(str(folder))
        return stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
    if _idx_file(folder, "train-images-idx3-ubyte"):
        return _load_idx(folder, None)
    raise FileNotFoundError(
        f"--dataset_path {folder} holds neither a data set stored by save_to_disk nor idx files "
        "(train-images-idx3-ubyte[.gz], ...); for image files in folders use --train_dir"
    )


def _load_folders(train_dir: str, validation_dir: str | None) -> DatasetDict:
    """Folders with one sub-folder of images per class."""
    folders = {"train": train_dir, "validation": validation_dir}
    files = {split: str(Path(folder).resolve() / "**") for split, folder in folders.items() if folder}
    return load_dataset("imagefolder", data_files=files, drop_labels=False)


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


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes: two zeros, the type 8, the number of dimensions, each as a big-endian word, the data."""
    path = _idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} has no {name}.gz and no {name}")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


def _from_arrays(images: np.ndarray, labels: np.ndarray, label_names: list[str]) -> Dataset:
    features = Features({"image": Array2D(images.shape[1:], "uint8"), "label": ClassLabel(names=label_names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def _split(splits: DatasetDict, name: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"the data set has no split {name!r}, only {list(splits)}")
    return splits[name]


def _hold_out(rows: Dataset, label_column: str, share: float) -> tuple[Dataset, Dataset]:
    """Part the rows at random, every class in the same proportion."""
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(
        np.arange(len(rows)), test_size=share, stratify=np.asarray(rows[label_column][:]), random_state=_SPLIT_SEED
    )
    return rows.select(kept), rows.select(held)


def _find_image_column(rows: Dataset) -> str:
    for name, feature in rows.features.items():
        if isinstance(feature, Image) or type(feature).__name__ in _ARRAYS:
            return name
    raise ValueError(f"no column holds images among {rows.column_names}: name it by --image_column_name")


def _find_label_column(rows: Dataset) -> str:
    for name in ("label", "labels"):
        if name in rows.column_names:
            return name
    classes = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    raise ValueError(f"cannot tell the label column among {rows.column_names}: name it by --label_column_name")


def _label_names(rows: Dataset, column: str) -> list[str]:
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = sorted(set(rows[column]))
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values) + 1)]
    return [str(value) for value in values]
