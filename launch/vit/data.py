"""Images of one size, labels, the order of images, and loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Image
from datasets import Dataset as Rows
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vit.sources import ImageData

if TYPE_CHECKING:
    from vit.args import Arguments, TrainingArguments

_DECODE_ROWS = 256  # rows decoded together


def natural_channels(data: ImageData) -> int:
    """Return 1 if the first training image is gray, else 3."""
    image = next(_decoded(data.train.select(range(1)), data.image_column))
    return 1 if image.mode in ("1", "L", "I", "I;16", "F") else 3


def to_pixels(image: Pillow.Image, size: int, channels: int) -> Tensor:
    """Scale the shorter side of an image to ``size`` and keep the middle, as uint8 (channels, size, size)."""
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Pillow.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def encode_labels(rows: Rows, column: str, label_names: list[str]) -> Tensor:
    """Return class indices, int64.

    Raises:
        ValueError: a label is not a class of the training split.
    """
    values = rows[column][:]
    indices = values
    if not isinstance(rows.features[column], ClassLabel):
        index = {name: i for i, name in enumerate(label_names)}
        indices = [index.get(str(value), -1) for value in values]
    wrong = sorted({value for value, i in zip(values, indices, strict=True) if not 0 <= i < len(label_names)})
    if wrong:
        raise ValueError(
            f"labels {wrong[:5]} of column {column!r} are none of the {len(label_names)} classes of the training "
            "split; is this split without labels?"
        )
    return torch.tensor(indices, dtype=torch.int64)


class Images(Dataset[dict[str, Tensor]]):
    """Rows as uint8 images of one size, and class indices.

    Args:
        rows: a split of ``data``.
        data: names of its columns and classes.
        size: side of the images.
        channels: 1 or 3.
        cache_bytes: images that fit in so much memory are decoded now, others batch by batch.
    """

    def __init__(self, rows: Rows, data: ImageData, size: int, channels: int, cache_bytes: float) -> None:
        self.rows = rows
        self.column = data.image_column
        self.shape = (channels, size, size)
        self.labels = encode_labels(rows, data.label_column, data.label_names)
        self.decoded = self._decode(rows) if len(rows) * channels * size * size <= cache_bytes else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch. The loader calls this instead of collecting rows one by one."""
        pixels = self._decode(self.rows.select(indices)) if self.decoded is None else self.decoded[indices]
        return {"pixel_values": pixels, "labels": self.labels[indices]}

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation per channel, in 0..1; of 2,048 images if they are not kept decoded."""
        pixels = self.decoded
        if pixels is None:
            pixels = self.__getitems__(list(range(min(2048, len(self)))))["pixel_values"]
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.transpose(0, 1)])
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
        mean = shares @ levels
        std = (shares @ levels.square() - mean.square()).clamp_min(1e-6).sqrt()
        return mean.tolist(), std.tolist()

    def _decode(self, rows: Rows) -> Tensor:
        pixels = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for place, image in enumerate(_decoded(rows, self.column)):
            pixels[place] = to_pixels(image, self.shape[1], self.shape[0])
        return pixels


def _decoded(rows: Rows, column: str) -> Iterator[Pillow.Image]:
    if not isinstance(rows.features[column], Image):
        rows = rows.with_format("numpy")  # array columns come as nested lists otherwise
    for batch in rows.select_columns([column]).iter(batch_size=_DECODE_ROWS):
        for image in batch[column]:
            yield Pillow.fromarray(image.astype(np.uint8)) if isinstance(image, np.ndarray) else image


class EpochSampler(Sampler[int]):
    """Shuffles the images of an epoch. The order depends on the seed and the epoch only, so a resumed run repeats it.

    There is no ``set_epoch``: Accelerate would call it, and its count of epochs starts at 0 in a resumed run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.start(0, 0, size)

    def start(self, epoch: int, first: int, last: int) -> None:
        """Let the next iteration yield positions ``first`` to ``last`` of this epoch's order."""
        self.epoch, self.first, self.last = epoch, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        yield from torch.randperm(self.size, generator=generator)[self.first : self.last].tolist()


def mixed_seed(*numbers: int) -> int:
    """Hash several numbers, such as (seed, step, rank), into one seed."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Plan:
    """Numbers of images and steps.

    Every step has exactly ``step_images`` images. Images that do not fill a whole step are dropped for that epoch.
    """

    step_images: int
    epoch_steps: int
    total_steps: int

    @classmethod
    def make(cls, args: TrainingArguments, images: int, processes: int) -> Plan:
        """Count the steps of training on ``images`` images with ``processes`` processes."""
        batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        step_images = batch * accumulated * processes
        epoch_steps = images // step_images
        if epoch_steps == 0:
            raise ValueError(
                f"{images} training images are fewer than the {step_images} of one step: "
                f"batch {batch} x accumulation {accumulated} x {processes} processes"
            )
        return cls(step_images, epoch_steps, args.max_train_steps or args.num_train_epochs * epoch_steps)

    @property
    def epochs(self) -> int:
        """Number of epochs that the run begins."""
        return -(-self.total_steps // self.epoch_steps)

    def last_step(self, epoch: int) -> int:
        """Return the last step of an epoch, or of the run if it ends earlier."""
        return min((epoch + 1) * self.epoch_steps, self.total_steps)


def make_loaders(
    args: Arguments, train: Images, validation: Images
) -> tuple[DataLoader[Any], DataLoader[Any], EpochSampler]:
    """Make loaders for training and evaluation, which Accelerate then splits, and the sampler of the first."""

    def loader(images: Images, batch_size: int, sampler: Sampler[int] | None) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler is not None,
            collate_fn=_identity,
            # Indexing decoded images is faster than sending a batch between processes.
            num_workers=args.data.dataloader_num_workers if images.decoded is None else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(args.training.seed),  # or it would use the global one
        )

    sampler = EpochSampler(len(train), args.training.seed)
    return (
        loader(train, args.training.per_device_train_batch_size, sampler),
        loader(validation, args.training.per_device_eval_batch_size, None),
        sampler,
    )


def _identity(batch: Any) -> Any:
    return batch


def normalization(args: Arguments, train: Images) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and std per channel, of the flags, the pretrained model, or the training images."""
    mean, std = args.data.image_mean, args.data.image_std
    if mean is None and args.model.model_name_or_path:
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            stored, _ = ImageProcessingMixin.get_image_processor_dict(args.model.model_name_or_path)
        except OSError:  # a model without a preprocessor_config.json
            stored = {}
        mean, std = stored.get("image_mean"), stored.get("image_std")
    if mean is None or std is None:
        return train.statistics()
    if not len(mean) == len(std) == train.shape[0]:
        raise ValueError(f"--image_mean and --image_std need {train.shape[0]} values each, got {mean} and {std}")
    return mean, std
