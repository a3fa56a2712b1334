"""Models: published ViT and Swin sizes by name, which options may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    ViTConfig,
)

if TYPE_CHECKING:
    from vit.args import ModelArguments


def _vit(hidden: int, layers: int, heads: int, mlp: int, image: int = 224, patch: int = 16) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "image_size": image,
        "patch_size": patch,
    }


def _swin(embed: int, depths: tuple[int, ...], heads: tuple[int, ...], drop_path: float) -> dict[str, Any]:
    own = {"embed_dim": embed, "depths": depths, "num_heads": heads, "drop_path_rate": drop_path}
    return {**own, "window_size": 7, "image_size": 224, "patch_size": 4}


PRESETS: dict[str, dict[str, Any]] = {
    "vit-digits": _vit(64, 4, 4, 128, image=8, patch=2),
    "vit-fashion": _vit(128, 4, 4, 256, image=28, patch=7),
    "vit-tiny": _vit(192, 12, 3, 768),
    "vit-small": _vit(384, 12, 6, 1536),
    "vit-base": _vit(768, 12, 12, 3072),
    "vit-large": _vit(1024, 24, 16, 4096),
    "vit-huge": _vit(1280, 32, 16, 5120, patch=14),
    "swin-tiny": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin-small": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin-base": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
}

LAYERS = {"vit": ["ViTLayer"], "swin": ["SwinLayer"]}  # by model type: the modules that FSDP wraps

_RATES = ("hidden_dropout_prob", "drop_path_rate")
_COMMON = ("image_size", "patch_size", "hidden_dropout_prob")
_BY_FAMILY = {
    "vit": (*_COMMON, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "swin": (*_COMMON, "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "drop_path_rate"),
}
_SIZES = {name for names in _BY_FAMILY.values() for name in names}


def build_config(args: ModelArguments, label_names: list[str], channels: int) -> PretrainedConfig:
    """Make the model's configuration from a preset or a pretrained model, and the options for sizes.

    Args:
        args: the options.
        label_names: the classes, in the order of their indices.
        channels: channels of the images; a pretrained model keeps its own.

    Raises:
        ValueError: the model does not have an option, or sizes contradict each other.
    """
    given = {name: value for name, value in vars(args).items() if name in _SIZES and value is not None}
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    config: PretrainedConfig
    if args.model is not None:
        family = args.model.split("-")[0]
        _reject(given, _BY_FAMILY[family], f"--model {args.model}")
        sizes = {**PRESETS[args.model], "num_channels": channels, **given}
        config = SwinConfig(**sizes, **labels) if family == "swin" else ViTConfig(**sizes, **labels)
    else:
        _reject(given, _RATES, "the weights of --model_name_or_path")
        config = AutoConfig.from_pretrained(args.model_name_or_path, **given, **labels)
    if config.model_type == "swin":
        _check_swin(config)
    return config


def build_model(args: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """Make a model for image classification, new or pretrained. A head for other classes is new."""
    if args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    else:
        model = AutoModelForImageClassification.from_config(config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def side(size: int | tuple[int, int]) -> int:
    """Return the side of a configuration's square images or patches."""
    return size if isinstance(size, int) else size[0]


def decays(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear and convolution layers, which usually decay."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}


def _reject(given: dict[str, Any], allowed: tuple[str, ...], owner: str) -> None:
    wrong = sorted(set(given) - set(allowed))
    if wrong:
        raise ValueError(f"{', '.join('--' + name for name in wrong)} cannot be set for {owner}")


def _check_swin(config: PretrainedConfig) -> None:
    last = side(config.image_size) // side(config.patch_size) // 2 ** (len(config.depths) - 1)
    if last < config.window_size:
        raise ValueError(
            f"--window_size {config.window_size} is more than the {last} patches on a side of Swin's last stage: "
            "transformers gives all stages the same window"
        )
    if len(config.depths) != len(config.num_heads):
        raise ValueError(f"--depths {list(config.depths)} and --num_heads {list(config.num_heads)} differ in length")
