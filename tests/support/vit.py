"""Shapes of vision transformers, as transformers makes them; nothing is allocated."""

from __future__ import annotations

import functools

import torch

BASE, LARGE = (768, 12), (1024, 24)  # hidden size and layers of ViT-B and ViT-L


@functools.cache
def vit_shapes(
    hidden: int, layers: int, *, image: int = 224, patch: int = 16, classes: int = 1000
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a ViTForImageClassification."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden, num_attention_heads=hidden // 32,
        image_size=image, patch_size=patch, num_labels=classes,
    )  # fmt: skip
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
