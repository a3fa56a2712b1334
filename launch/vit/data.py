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

_READ_ROWS = 256  # rows read together
_CHANNEL_ROWS = 64  # images that decide on the number of channels
_STATISTICS_ROWS = 2048

# Modes of Pillow.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_GRAY = ("1", "L", "I", "F", *_SIXTEEN_BITS)
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def natural_channels(data: ImageData) -> int:
    """Return 1 if the training images are gray, else 3. Looks at 64 of them."""
    images = _decoded(data.train, data.image_column, spread_rows(len(data.train), _CHANNEL_ROWS))
    return 1 if all(image.mode in _GRAY for _, image in images) else 3


def spread_rows(total: int, count: int) -> list[int]:
    """Return ``count`` rows of ``total``, evenly spread, or all of them if they are fewer."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long().tolist()


def to_pixels(image: Pillow.Image, size: int, channels: int) -> Tensor:
    """Scale the shorter side of an image to ``size`` and keep the middle, as uint8 (channels, size, size).

    Raises:
        ValueError: its mode or the range of its values is not supported.
    """
    image = _eight_bits(image).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Pillow.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def _eight_bits(image: Pillow.Image) -> Pillow.Image:
    """Bring 16 bits to 8. Pillow would clip them."""
    if image.mode in _EIGHT_BITS:
        return image
    if image.mode != "I" and image.mode not in _SIXTEEN_BITS:
        raise ValueError(f"mode {image.mode} is not supported: convert the images to mode L or RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"values go from {low} to {high}: convert the images to 16 bits, 0 to 65535, or to mode L")
    shift = 0 if image.mode == "I" and high <= 0xFF else 8
    return Pillow.fromarray((values >> shift).astype(np.uint8))


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
        self.decoded = self._decode() if len(rows) * channels * size * size <= cache_bytes else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch. The loader calls this instead of collecting rows one by one."""
        pixels = self._decode(indices) if self.decoded is None else self.decoded[indices]
        return {"pixel_values": pixels, "labels": self.labels[indices]}

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation per channel, in 0..1.

        Images that are not kept decoded stand for the others: 2,048 of them, evenly spread.
        """
        pixels = self.decoded
        if pixels is None:
            pixels = self._decode(spread_rows(len(self), _STATISTICS_ROWS))
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.transpose(0, 1)])
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
        mean = shares @ levels
        std = (shares @ levels.square() - mean.square()).clamp_min(1e-6).sqrt()
        return mean.tolist(), std.tolist()

    def _decode(self, numbers: list[int] | None = None) -> Tensor:
        """Return the pixels of these rows, or of all."""
        pixels = torch.empty((len(self) if numbers is None else len(numbers), *self.shape), dtype=torch.uint8)
        for place, (name, image) in enumerate(_decoded(self.rows, self.column, numbers)):
            try:
                pixels[place] = to_pixels(image, self.shape[1], self.shape[0])
            except ValueError as error:
                raise ValueError(f"image {name}: {error}") from error
        return pixels


def _decoded(rows: Rows, column: str, numbers: list[int] | None = None) -> Iterator[tuple[str, Pillow.Image]]:
    """Yield the images of these rows, or of all, each with the name of its file or row.

    Raises:
        ValueError: an image cannot be read.
    """
    feature = rows.features[column]
    encoded = isinstance(feature, Image)
    # Encoded images are decoded here, so that a broken one can be named. Other columns would come as nested lists.
    chosen = rows.select_columns([column]).with_format("arrow" if encoded else "numpy")
    chosen = chosen if numbers is None else chosen.select(numbers)
    places = iter(range(len(rows)) if numbers is None else numbers)
    for batch in chosen.iter(batch_size=_READ_ROWS):
        for value in batch[column].to_pylist() if encoded else batch[column]:
            name = _name(rows, next(places), value)
            try:
                image = feature.decode_example(value) if encoded else Pillow.fromarray(value.astype(np.uint8))
            except Exception as error:  # Pillow raises many kinds
                raise ValueError(f"image {name} cannot be read: {error}") from error
            if image is None:
                raise ValueError(f"{name} has no image")
            yield name, image


def _name(rows: Rows, number: int, value: Any) -> str:
    """Return the path of an image, or its row before any split."""
    if isinstance(value, dict) and value["path"]:
        return str(value["path"])
    mapping = rows._indices
    return f"row {number if mapping is None else mapping.column(0)[number].as_py()}"


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
