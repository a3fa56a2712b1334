# ruff: noqa: RUF009 (fields are made by a function)
"""The options of train_vit.py as dataclasses. Some defaults depend on the data set or the optimizer."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from vit.augment import AUGMENTATIONS
from vit.model import PRESETS
from vit.optim import OPTIMIZERS, is_soap

from sharded_shampoo4.arguments import Shampoo4Arguments

# Defaults by data set. "other" is for color images of an ordinary size.
_BY_DATA_SET: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "vit-digits",
        "num_train_epochs": 30,
        "per_device_train_batch_size": 64,
        "augment": "none",  # a digit fills its 8x8 image: a shift by a pixel cuts it, and accuracy falls
    },
    "fashion-mnist": {
        "model": "vit-fashion",
        "num_train_epochs": 6,
        "per_device_train_batch_size": 128,
        "augment": "none",
    },
    "other": {
        "model": "vit-tiny",
        "num_train_epochs": 100,
        "per_device_train_batch_size": 128,
        "augment": "flip-crop",
    },
}
_SHORT_RUNS = {"statistics_interval": 10, "root_interval": 50}
# Smallest and largest values of options. Other whole numbers must be at least 1.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, math.inf),
    "local_rank": (-1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "crop_padding": (0, math.inf),
    "mixup": (0, math.inf),
    "num_warmup_steps": (0, math.inf),
    "warmup_ratio": (0, 1),
    "max_grad_norm": (0, math.inf),
}
# What an option of the command line replaces in a recipe, beside the option itself.
_ABOUT_DATA = ("dataset_config_name", "validation_split", "image_column_name", "label_column_name")
_REPLACED: dict[str, tuple[str, ...]] = {
    "dataset_name": ("dataset_path", "train_dir", "validation_dir", *_ABOUT_DATA),
    "dataset_path": ("dataset_name", "train_dir", "validation_dir"),  # a copy of that data set has its columns
    "train_dir": ("dataset_name", "dataset_path", "validation_dir", *_ABOUT_DATA),
    "model": ("model_name_or_path",),
    "model_name_or_path": ("model",),
    "num_train_epochs": ("max_train_steps",),
    "warmup_ratio": ("num_warmup_steps",),
}
# Those of transformers that need no arguments of their own.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip


def _option(default: Any, help: str, **of_argparse: Any) -> Any:
    if default in (None, False):
        help += "%(default).0s"  # or HfArgumentParser appends "(default: None)"
    return field(default=default, metadata={"help": help, **of_argparse})


@dataclass
class DataArguments:
    """The images, and how they are prepared."""

    _argument_group_name = "data"

    dataset_name: str | None = _option(None, "digits (default), fashion-mnist, or an image data set of the hub")
    dataset_config_name: str | None = _option(None, "configuration of a hub data set")
    dataset_path: str | None = _option(None, "folder: a data set stored by save_to_disk, or MNIST-like idx files")
    train_dir: str | None = _option(None, "image folder with one sub-folder per class")
    validation_dir: str | None = _option(None, "image folder for evaluation (default: a part of --train_dir)")
    validation_split: str | None = _option(
        None, "evaluation split (default: validation, else test, else a held-out part)"
    )
    train_val_split: float = _option(0.2, "share held out, by class, where there is no such split")
    image_column_name: str | None = _option(None, "column with the images (default: the one that holds images)")
    label_column_name: str | None = _option(
        None, "column with the labels (default: label, labels, or the one that holds classes)"
    )
    max_train_samples: int | None = _option(None, "train on N images only: the first, or random ones of --train_dir")
    max_eval_samples: int | None = _option(None, "evaluate on N images only, chosen in the same way")
    cache_images_gb: float = _option(1.0, "decode the images once when they fit in this much memory")
    dataloader_num_workers: int = _option(0, "processes that decode images which are not kept decoded")
    image_mean: list[float] | None = _option(None, "per channel, in 0..1 (default: that of the training images)")
    image_std: list[float] | None = _option(None, "per channel, in 0..1 (default: that of the training images)")
    augment: str | None = _option(None, "on batches of training images (default: by data set)", choices=AUGMENTATIONS)
    crop_padding: int = _option(4, "pixels of zero padding for the random crop")
    mixup: float = _option(0.0, "mixup with Beta(ALPHA, ALPHA); 0 is off", metavar="ALPHA")

    def __post_init__(self) -> None:
        if self.train_dir and (self.dataset_name or self.dataset_path):
            raise ValueError("--train_dir is a data set of its own: drop --dataset_name and --dataset_path")
        if self.validation_dir and not self.train_dir:
            raise ValueError("--validation_dir needs --train_dir")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("--image_mean and --image_std go together")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split must be between 0 and 1, got {self.train_val_split}")


@dataclass
class ModelArguments:
    """The model and its sizes."""

    _argument_group_name = "model"

    model: str | None = _option(None, "size by name (default: by data set)", choices=sorted(PRESETS))
    model_name_or_path: str | None = _option(None, "pretrained model to start from, instead of --model")
    image_size: int | None = _option(None, "images are brought to this side")
    patch_size: int | None = _option(None, "side of a square of pixels that becomes a token")
    hidden_size: int | None = _option(None, "ViT only")
    num_hidden_layers: int | None = _option(None, "ViT only")
    num_attention_heads: int | None = _option(None, "ViT only")
    intermediate_size: int | None = _option(None, "ViT only")
    embed_dim: int | None = _option(None, "Swin only")
    depths: list[int] | None = _option(None, "Swin only")
    num_heads: list[int] | None = _option(None, "Swin only")
    window_size: int | None = _option(None, "Swin only")
    mlp_ratio: float | None = _option(None, "Swin only")
    drop_path_rate: float | None = _option(None, "Swin only")
    hidden_dropout_prob: float | None = _option(None, "dropout in the network")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")

    def __post_init__(self) -> None:
        if self.model and self.model_name_or_path:
            raise ValueError("give --model or --model_name_or_path, not both")


@dataclass
class TrainingArguments:
    """Steps, options of the base optimizer, and output files. Shampoo4Arguments has the options of Shampoo4."""

    _argument_group_name = "training"

    output_dir: str = _option("runs/vit", "results, curves, the trained model and checkpoints")
    overwrite_output_dir: bool = _option(False, "start again in a used folder: removes its checkpoints")
    recipe: str | None = _option(None, "YAML file of options; the command line overrides it", metavar="FILE")
    seed: int = _option(0, "of weights, order, augmentation and dropout")
    per_device_train_batch_size: int | None = _option(None, "images per process and batch (default: by data set)")
    per_device_eval_batch_size: int = _option(512, "images per process and batch")
    gradient_accumulation_steps: int = _option(1, "batches per optimizer step")
    num_train_epochs: int | None = _option(None, "passes over the training images (default: by data set)")
    max_train_steps: int | None = _option(None, "optimizer steps; overrides --num_train_epochs")
    optimizer: str = _option(
        "shampoo4",
        "compact: the smallest state; paper: the rule of 4-bit Shampoo; naive: the same, but quantizes the "
        "preconditioner itself; shampoo32: the same in float32",
        choices=OPTIMIZERS,
    )
    shampoo_base: str = _option("adamw", "optimizer that takes Shampoo's direction", choices=("adamw", "sgd"))
    learning_rate: float | None = _option(
        None, 'peak of the schedule (default: 1e-3, or 0.1 for SGD, also as the base of method="shampoo")'
    )
    weight_decay: float = _option(0.05, "decoupled under AdamW, added to the gradient under SGD")
    decay_all: bool = _option(False, "decay every parameter, not only weights of linear and convolution layers")
    adam_beta1: float = _option(0.9, "decay of the first moment")
    adam_beta2: float = _option(0.999, "decay of the second moment")
    adam_epsilon: float = _option(1e-8, "added to the root of the second moment")
    momentum: float = _option(0.9, "of SGD")
    nesterov: bool = _option(False, "the variant of SGD's momentum")
    lr_scheduler_type: str = _option("cosine", "of transformers", choices=SCHEDULES)
    num_warmup_steps: int | None = _option(None, "overrides --warmup_ratio")
    warmup_ratio: float = _option(0.1, "share of the steps in which the learning rate rises")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm; 0 is off")
    label_smoothing: float = _option(0.0, "share of the target spread over all classes")
    mixed_precision: str | None = _option(
        None, "of the computation (default: accelerate's configuration)", choices=("no", "fp16", "bf16")
    )
    deepspeed_config: str | None = _option(
        None, "train with DeepSpeed; for torchrun and the deepspeed launcher", metavar="FILE"
    )
    local_rank: int = _option(-1, "given by the deepspeed launcher, not used")
    ddp_timeout: int = _option(1800, "seconds to wait for a process that does not answer")
    checkpointing_steps: str | None = _option(None, "save every N steps, or 'epoch'", metavar="N|epoch")
    checkpoints_total_limit: int | None = _option(None, "keep the newest N checkpoints")
    resume_from_checkpoint: str | None = _option(
        None, "latest: the newest in --output_dir, if any", metavar="PATH|latest"
    )
    logging_steps: int = _option(10, "optimizer steps between two lines of metrics.jsonl")
    log_health: bool = _option(False, "the factors' state after every epoch: health.jsonl, health.png")
    with_tracking: bool = _option(False, "also write TensorBoard files")

    def __post_init__(self) -> None:
        every = self.checkpointing_steps
        if every not in (None, "epoch") and not (every.isdecimal() and int(every) > 0):
            raise ValueError(f"--checkpointing_steps must be 'epoch' or at least 1, got {every}")


@dataclass
class Arguments:
    """All options of a run, with every default resolved."""

    data: DataArguments
    model: ModelArguments
    training: TrainingArguments
    shampoo: dict[str, Any]  # keyword arguments of Shampoo4

    def flat(self) -> dict[str, Any]:
        """Return all options by name, as plain values."""
        return {**asdict(self.data), **asdict(self.model), **asdict(self.training), **self.shampoo}


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check the command line and its recipe. A wrong option ends the program with a message."""
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TrainingArguments, Shampoo4Arguments),
        description="Train a vision transformer, with Shampoo4 or an optimizer to compare it with: one process, "
        "or many under torchrun, accelerate launch or deepspeed. launch/README.md shows how. Runs are short here: "
        'with method="shampoo" the intervals are 10 and 50 steps unless they or a preset are given.',
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        typed = vars(parser.parse_args(given))
        given = [*_flags(_recipe(typed, given)), *given] if typed["recipe"] else given
        parser.set_defaults(**_defaults(vars(parser.parse_args(given))))
        data, model, training, shampoo = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
        arguments = Arguments(data, model, training, _shampoo_options(training.optimizer, shampoo.given()))
        _check_ranges(arguments)
        _warn_of_unused(training.optimizer, typed)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    return arguments


def _check_ranges(arguments: Arguments) -> None:
    for name, value in arguments.flat().items():
        if name in arguments.shampoo or value is None:  # Shampoo4 checks its own
            continue
        low, high = _RANGES.get(name, (1, math.inf) if type(value) is int else (None, None))
        if low is not None and not low <= value <= high:
            allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"--{name} must be {allowed}, got {value}")


def _warn_of_unused(optimizer: str, typed: dict[str, Any]) -> None:
    """Name options of Shampoo4 on the command line of another optimizer. A recipe may have them for other runs.

    No error, since compare.py gives the same options to all optimizers.
    """
    unused = [option.name for option in fields(Shampoo4Arguments) if typed[option.name] is not None]
    if typed["shampoo_base"] != TrainingArguments.shampoo_base:
        unused.append("shampoo_base")
    if unused and not optimizer.startswith("shampoo"):
        warnings.warn(f"--optimizer {optimizer} does not use --{', --'.join(unused)}", stacklevel=3)


def _recipe(typed: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Read the YAML file of names and values, without what the words of the command line replace."""
    file = Path(typed["recipe"])
    recipe = yaml.safe_load(file.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"--recipe {file} has no lines such as 'learning_rate: 1e-3'")
    names = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in given if word.startswith("--")}
    gone = names.union(*(_REPLACED.get(name, ()) for name in names))
    if "optimizer" in names:
        gone |= OPTIMIZERS[typed["optimizer"]].keys()
    if "dataset_path" in names and recipe.get("dataset_name") == "fashion-mnist":  # which a folder of it leaves valid
        gone -= {"dataset_name"} - names
    return {name: value for name, value in recipe.items() if str(name).replace("-", "_") not in gone}


def _flags(recipe: dict[str, Any]) -> list[str]:
    """Return names and values as command-line flags."""
    values = {name: value if isinstance(value, list) else [value] for name, value in recipe.items()}
    return [word for name in values for word in (f"--{name}", *map(str, values[name]))]


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on the data set or the optimizer."""
    source = given["dataset_name"] or ("other" if given["dataset_path"] or given["train_dir"] else "digits")
    defaults = dict(_BY_DATA_SET.get(source, _BY_DATA_SET["other"]))
    if source == "digits":
        defaults["dataset_name"] = "digits"
    if given["model_name_or_path"]:
        del defaults["model"]
    rule = given["optimizer"]
    if rule.startswith("shampoo"):
        options = {name: given[name] for name in ("preset", "method") if given[name] is not None}
        rule = "soap" if is_soap({**OPTIMIZERS[rule], **options}) else given["shampoo_base"]
    return {**defaults, "learning_rate": 0.1 if rule == "sgd" else 1e-3}


def _shampoo_options(optimizer: str, given: dict[str, Any]) -> dict[str, Any]:
    """Merge the options of Shampoo4 that ``--optimizer`` stands for with those on the command line."""
    own = OPTIMIZERS[optimizer]
    for name in own.keys() & given.keys():
        if given[name] != own[name]:
            raise ValueError(
                f"--optimizer {optimizer} means --{name} {own[name]}, which --{name} {given[name]} contradicts"
            )
    options = {**own, **given}
    return options if is_soap(options) or "preset" in options else {**_SHORT_RUNS, **options}
