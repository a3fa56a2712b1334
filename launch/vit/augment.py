"""Augmentation and normalization of batches of uint8 images, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AUGMENTATIONS = ("none", "flip", "flip-crop", "resized-crop")


class BatchTransform(nn.Module):
    """Turns ``pixel_values`` (B, C, H, W) in uint8 and ``labels`` (B,) into float images and targets.

    Random numbers come from torch's global generator.

    Args:
        mean: per channel, of images in 0..1.
        std: per channel.
        image_size: side of the images.
        num_labels: number of classes, the width of mixed targets.
        augment: one of ``AUGMENTATIONS``, for training mode.
        crop_padding: pixels of zeros around an image before a random crop of its size.
        mixup: alpha of mixup's distribution Beta(alpha, alpha), for training mode; 0 is off.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        image_size: int,
        num_labels: int,
        augment: str = "none",
        crop_padding: int = 4,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std need one value per channel, std above 0; got {list(mean)} and {list(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.image_size = image_size
        self.num_labels = num_labels
        self.mixup = mixup
        self.augmentation = _augmentation(augment, image_size, crop_padding)

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return images, and targets: class indices, or under mixup a share for each class."""
        images, labels = batch["pixel_values"].float() / 255, batch["labels"]
        if self.training:
            images = self.augmentation(images)
        images = (images - self.mean) / self.std
        if self.training and self.mixup > 0:
            return mix(images, labels, self.num_labels, self.mixup)
        return images, labels

    def as_processor(self) -> dict[str, object]:
        """Return size and normalization in the form of a model's ``preprocessor_config.json``."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        }


def mix(images: Tensor, labels: Tensor, num_labels: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image and its target with another's, in random shares (mixup, Zhang et al. 2018)."""
    # On the CPU, as in kornia: the same seed gives the same shares on every device.
    shares = torch.distributions.Beta(alpha, alpha).sample((len(images),)).to(images)
    partner = torch.randperm(len(images)).to(images.device)
    targets = F.one_hot(labels, num_labels).to(images)
    return (
        torch.lerp(images[partner], images, shares.view(-1, 1, 1, 1)),
        torch.lerp(targets[partner], targets, shares.view(-1, 1)),
    )


def _augmentation(name: str, image_size: int, crop_padding: int) -> nn.Module:
    if name == "none":
        return nn.Identity()
    import kornia.augmentation as K  # takes seconds

    size = (image_size, image_size)
    further = {
        "flip": lambda: [],
        "flip-crop": lambda: [K.RandomCrop(size, padding=crop_padding)],
        "resized-crop": lambda: [K.RandomResizedCrop(size, scale=(0.3, 1.0))],
    }
    return nn.Sequential(K.RandomHorizontalFlip(p=0.5), *further[name]())
