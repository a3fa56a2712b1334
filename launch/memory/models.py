"""Models by name for the memory report: their configurations, and their parameters' shapes, which are never allocated.

Sources of the sizes that ``vit.model.PRESETS`` does not have:

* ViT-g/14 and ViT-G/14: Zhai et al., "Scaling Vision Transformers" (arXiv 2106.04560), table 2;
* ViT-e/14: Chen et al., "PaLI" (arXiv 2209.06794), 3.9 billion parameters with its own, larger head;
* ViT-22B/14: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442), table 1. That
  model has no biases in its query, key and value projections and in its norms, but norms of queries and keys; here it
  is the plain ViT of these dimensions, which differs by less than 0.1 % of the parameters;
* Llama-2-7B, Llama-3.2-1B, Llama-3.1-8B, Mixtral-8x7B, Qwen3-30B-A3B, gpt-oss-20b and Mamba-2.8B: the ``config.json``
  of the published models.

All image models have 1000 classes and 224 x 224 images, except the small ones of the presets.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Size, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SwinConfig,
    ViTConfig,
)
from vit.model import PRESETS

Shapes = dict[str, Size]


def _vit(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return {**sizes, "image_size": 224, "patch_size": 14}


def _llama(hidden: int, layers: int, mlp: int, tied: bool, key_heads: int = 8, words: int = 128_256) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 32, "intermediate_size": mlp}
    return {**sizes, "num_key_value_heads": key_heads, "vocab_size": words, "tie_word_embeddings": tied}


SIZES: dict[str, dict[str, Any]] = {
    **PRESETS,
    "vit-giant": _vit(1408, 40, 16, 6144),
    "vit-gigantic": _vit(1664, 48, 16, 8192),
    "vit-enormous": _vit(1792, 56, 16, 15360),
    "vit-22b": _vit(6144, 48, 48, 24576),
    "llama-1b": _llama(2048, 16, 8192, tied=True),
    "llama-7b": _llama(4096, 32, 11008, tied=False, key_heads=32, words=32_000),
    "llama-8b": _llama(4096, 32, 14336, tied=False),
    "mixtral-8x7b": {**_llama(4096, 32, 14336, tied=False, words=32_000), "num_local_experts": 8},
    "qwen3moe-30b": {
        **_llama(2048, 48, 6144, tied=False, key_heads=4, words=151_936),
        "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    },
    "gptoss-20b": {
        **_llama(2880, 24, 2880, tied=False, words=201_088),
        "num_attention_heads": 64, "head_dim": 64, "num_local_experts": 32,
    },
    "mamba-2.8b": {
        "hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50_280, "state_size": 16, "expand": 2,
    },
}  # fmt: skip

TITLES = {
    "vit-small": "ViT-S/16",
    "vit-base": "ViT-B/16",
    "vit-large": "ViT-L/16",
    "vit-huge": "ViT-H/14",
    "vit-giant": "ViT-g/14",
    "vit-gigantic": "ViT-G/14",
    "vit-enormous": "ViT-e/14",
    "vit-22b": "ViT-22B/14",
    "swin-tiny": "Swin-T",
    "llama-1b": "Llama-3.2-1B",
    "llama-7b": "Llama-2-7B",
    "llama-8b": "Llama-3.1-8B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "qwen3moe-30b": "Qwen3-30B-A3B",
    "gptoss-20b": "gpt-oss-20b",
    "mamba-2.8b": "Mamba-2.8B",
}

VITS = tuple(name for name in TITLES if name.startswith("vit"))  # by size

_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "vit": ViTConfig,
    "swin": SwinConfig,
    "llama": LlamaConfig,
    "mixtral": MixtralConfig,
    "qwen3moe": Qwen3MoeConfig,
    "gptoss": GptOssConfig,
    "mamba": MambaConfig,
}


def title(name: str) -> str:
    """Name a model as tables do."""
    return TITLES.get(name, name)


def build(name: str, layers: int | None = None) -> nn.Module:
    """Make the model with random weights on torch's current default device.

    Args:
        name: a key of ``SIZES``.
        layers: another depth of a ViT or Llama.
    """
    family = name.split("-")[0]
    sizes = SIZES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    of_images = family in ("vit", "swin")
    labels = {"num_labels": 1000} if of_images else {}
    make = AutoModelForImageClassification if of_images else AutoModelForCausalLM
    model: nn.Module = make.from_config(_CONFIGS[family](**sizes, **labels))  # type: ignore[no-untyped-call]
    return model


@functools.lru_cache(maxsize=512)
def shapes_of(name: str, layers: int | None = None) -> Shapes:
    """Names and shapes of the trained parameters, tied ones once, in the order of ``model.named_parameters()``."""
    with torch.device("meta"):
        model = build(name, layers)
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def adapters_of(name: str, rank: int) -> Shapes:
    """Names and shapes of LoRA adapters of a ``rank`` beside every matrix of a Llama but embedding and head."""
    found: Shapes = {}
    for key, shape in shapes_of(name).items():
        if key.endswith("_proj.weight"):
            path, (rows, columns) = key.removesuffix(".weight"), shape
            found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = Size([rank, columns]), Size([rows, rank])
    return found


def parameter_count(shapes: Shapes) -> int:
    """Elements of all parameters."""
    return sum(shape.numel() for shape in shapes.values())
