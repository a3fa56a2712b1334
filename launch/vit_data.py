"""From rows to batches: decoding, sizes, labels, the order of the images and the loaders."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Rows
from datasets import Image
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from vit_sources import ImageData

_DECODE_ROWS = 256  # rows decoded together


def natural_channels(data: ImageData) -> int:
    """1 when the first training image is grey, 3 otherwise."""
    image = next(_decoded(data.train.select(range(1)), data.image_column))
    if isinstance(image, Pillow.Image):
        return 1 if image.mode in ("1", "L", "I", "I;16", "F") else 3
    return 1 if image.ndim == 2 or 1 in (image.shape[0], image.shape[-1]) else 3


def to_pixels(image: Pillow.Image | np.ndarray, size: int, channels: int) -> np.ndarray:
    """An image as uint8 (channels, size, size): the shorter side brought to ``size``, the middle cut out."""
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Pillow.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _from_array(array: np.ndarray) -> Pillow.Image:
    array = array.astype(np.uint8)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)  # (channels, height, width), as torch has it
    return Pillow.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)


def _decoded(rows: Rows, column: str) -> Iterator[Pillow.Image | np.ndarray]:
    if not isinstance(rows.features[column], Image):
        rows = rows.with_format("numpy")  # array columns come as nested lists otherwise
    for batch in rows.select_columns([column]).iter(batch_size=_DECODE_ROWS):
        yield from batch[column]


def encode_labels(rows: Rows, column: str, label_names: list[str]) -> Tensor:
    """Class indices. Raises ValueError for a label outside the training split's classes."""
    values = rows[column]
    if len(values) and isinstance(values[0], str):
        index = {name: i for i, name in enumerate(label_names)}
        unknown = sorted(set(values) - set(index))
        if unknown:
            raise ValueError(f"labels {unknown[:5]} of column {column!r} do not occur in the training split")
        values = [index[value] for value in values]
    labels = torch.tensor(list(values), dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(label_names):
        raise ValueError(
            f"column {column!r} holds labels {int(labels.min())}..{int(labels.max())}, but there are "
            f"{len(label_names)} classes; is this split without labels?"
        )
    return labels


class DecodedImages(Dataset[dict[str, Tensor]]):
    """Images decoded once and kept as one uint8 tensor; a batch is one indexing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: the loader calls this instead of collecting rows one by one."""
        rows = torch.tensor(indices)
        return {"pixel_values": self.images[rows], "labels": self.labels[rows]}


class EncodedImages(Dataset[dict[str, Tensor]]):
    """Images decoded whenever a batch asks for them, in the loader's workers."""

    def __init__(self, rows: Rows, column: str, labels: Tensor, size: int, channels: int) -> None:
        self.rows = rows
        self.column = column
        self.labels = labels
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        pixels = [
            to_pixels(image, self.size, self.channels) for image in _decoded(self.rows.select(indices), self.column)
        ]
        return {"pixel_values": torch.from_numpy(np.stack(pixels)), "labels": self.labels[torch.tensor(indices)]}


def prepare_images(
    rows: Rows, data: ImageData, size: int, channels: int, cache_bytes: float
) -> DecodedImages | EncodedImages:
    """The rows as a torch data set: decoded now if they fit in ``cache_bytes``, else batch by batch."""
    labels = encode_labels(rows, data.label_column, data.label_names)
    encoded = EncodedImages(rows, data.image_column, labels, size, channels)
    if len(rows) * channels * size * size > cache_bytes:
        return encoded
    images = torch.empty((len(rows), channels, size, size), dtype=torch.uint8)
    for row, image in enumerate(_decoded(rows, data.image_column)):
        images[row] = torch.from_numpy(to_pixels(image, size, channels).copy())
    return DecodedImages(images, labels)


def pixel_statistics(images: DecodedImages | EncodedImages) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1; the first 2,048 images speak for a set that is not decoded."""
    if isinstance(images, DecodedImages):
        pixels = images.images
    else:
        pixels = images.__getitems__(list(range(min(2048, len(images)))))["pixel_values"]
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.transpose(0, 1)])
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp_min(1e-6).sqrt()
    return mean.tolist(), std.tolist()


class EpochSampler(Sampler[int]):
    """The order of an epoch: a pure function of the seed and the epoch, so that a resumed run needs no state for it.

    ``Accelerate`` deals the batches to the processes. It must not count epochs for us, hence no ``set_epoch``: after a
    resume in mid-epoch its count would start at 0 again.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.start(0, 0, size)

    def start(self, epoch: int, first: int, last: int) -> None:
        """What the next iteration gives: the images at places ``first`` to ``last`` of this epoch's order."""
        self.epoch, self.first, self.last = epoch, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        yield from torch.randperm(self.size, generator=generator)[self.first : self.last].tolist()


def mixed_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers, such as (seed, step, rank)."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Plan:
    """How many images and steps an epoch has.

    Every step sees exactly ``step_images`` images. What an epoch has left over, less than a step's worth, sits out that
    epoch; the next one is shuffled anew. So no step is smaller than its siblings, whatever the accumulation.
    """

    step_images: int
    epoch_steps: int
    total_steps: int

    @classmethod
    def make(cls, args: argparse.Namespace, images: int, processes: int) -> Plan:
        step_images = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        epoch_steps = images // step_images
        if epoch_steps == 0:
            raise ValueError(
                f"{images} training images are fewer than the {step_images} of one step: "
                f"batch {args.per_device_train_batch_size} x accumulation {args.gradient_accumulation_steps} "
                f"x {processes} processes"
            )
        return cls(step_images, epoch_steps, args.max_train_steps or args.num_train_epochs * epoch_steps)

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.epoch_steps)

    def last_step(self, epoch: int) -> int:
        """The step with which an epoch ends, or the run before that."""
        return min((epoch + 1) * self.epoch_steps, self.total_steps)


def make_loaders(
    args: argparse.Namespace, train: Dataset[Any], validation: Dataset[Any]
) -> tuple[DataLoader[Any], DataLoader[Any], EpochSampler]:
    """Loaders for training and evaluation, not yet dealt to processes, and the sampler that orders the first."""

    def loader(dataset: Dataset[Any], batch_size: int, sampler: Sampler[int] | None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler is not None,
            collate_fn=_as_it_is,
            # Decoded images need no workers: indexing is faster than sending a batch between processes.
            num_workers=0 if isinstance(dataset, DecodedImages) else args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(args.seed),  # keeps the loader off the global generator
        )

    sampler = EpochSampler(len(train), args.seed)  # type: ignore[arg-type]
    return (
        loader(train, args.per_device_train_batch_size, sampler),
        loader(validation, args.per_device_eval_batch_size, None),
        sampler,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def normalisation(
    args: argparse.Namespace, train: DecodedImages | EncodedImages, channels: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std per channel: the flags', the pretrained model's, or the training images' own."""
    mean, std = args.image_mean, args.image_std
    if mean is None and args.model_name_or_path:
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            stored, _ = ImageProcessingMixin.get_image_processor_dict(args.model_name_or_path)
        except OSError:  # a model without a preprocessor_config.json
            stored = {}
        mean, std = stored.get("image_mean"), stored.get("image_std")
    if mean is None or std is None:
        return pixel_statistics(train)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"--image_mean and --image_std need {channels} values each, got {mean} and {std}")
    return mean, std
