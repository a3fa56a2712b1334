"""Command line of train_vit.py: the flags, and the defaults that depend on the data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import SchedulerType
from vit_augment import AUGMENTATIONS
from vit_model import PRESETS

from sharded_shampoo4 import Shampoo4

OPTIMIZERS = ("shampoo4", "shampoo4-compact", "shampoo32", "shampoo4-naive", "adamw", "sgd")

# What a data set's run uses where the command line is silent. "other" is for colour images of an ordinary size.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "vit-digits",
        "num_train_epochs": 30,
        "per_device_train_batch_size": 64,
        "augment": "none",  # the figures fill the 8x8 image: moving one by a pixel cuts it, and accuracy falls
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


_STORED_AS_PUBLISHED = {"codebook": "linear2", "scale_dtype": "float32", "root": "stored", "rectify_steps": (1, 4)}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a flag's default where there is one and the help does not tell it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; a flag that is not known in full is an error."""
    parser = argparse.ArgumentParser(
        description="Train a vision transformer, with 4-bit Shampoo or an optimizer to compare it with: one process, "
        "or many under torchrun, accelerate launch or deepspeed. launch/README.md shows how.",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for add_group in (_add_data, _add_model, _add_training, _add_optimizer, _add_shampoo, _add_output):
        add_group(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if args.recipe:
        args = parser.parse_args([*_recipe_flags(parser, Path(args.recipe)), *given])
    _fill_defaults(args)
    _check(parser, args)
    return args


def _recipe_flags(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The flags that a YAML file of names and values stands for."""
    try:
        recipe = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--recipe {file}: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"--recipe {file} has no lines such as 'learning_rate: 1e-3'")
    flags = []
    for name, value in recipe.items():
        if value is False:
            flags.append(f"--no-{name}")
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--recipe", metavar="FILE", help="YAML file of flags and values; the command line overrides it")
    add("--dataset_name", help="digits (default), fashion-mnist, or an image data set of the Hugging Face hub")
    add("--dataset_config_name", help="configuration of a hub data set")
    add("--dataset_path", help="folder: a data set stored by save_to_disk, or MNIST-like idx files")
    add("--train_dir", help="image folder with one sub-folder per class")
    add("--validation_dir", help="image folder for evaluation; without it a part of --train_dir is held out")
    add("--train_split", default="train", help="name of the training split")
    add("--validation_split", help="evaluation split (default: validation, else test, else a held-out part)")
    add("--train_val_split", type=float, default=0.2, help="share held out, by class, where there is no such split")
    add("--image_column_name", help="column with the images (default: the one that holds images)")
    add("--label_column_name", help="column with the labels (default: label, labels, or the one that holds classes)")
    add("--max_train_samples", type=_positive, help="train on the first N images only")
    add("--max_eval_samples", type=_positive, help="evaluate on the first N images only")
    add("--cache_images_gb", type=float, default=1.0, help="decode the images once when they fit in this much memory")
    add("--dataloader_num_workers", type=int, default=0, help="processes that decode images which are not kept decoded")
    add("--image_mean", type=float, nargs="+", help="per channel, in 0..1 (default: measured on the training images)")
    add("--image_std", type=float, nargs="+", help="per channel, in 0..1 (default: measured on the training images)")
    add("--augment", choices=AUGMENTATIONS, help="on batches of training images (default: none for the grey data sets)")
    add("--crop_padding", type=int, default=4, help="pixels of zero padding for the random crop")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup with Beta(ALPHA, ALPHA); 0 is off")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=sorted(PRESETS), help="preset (default: a small one that fits the data set)")
    add("--config_name", help="configuration to start from, instead of a preset")
    add("--model_name_or_path", help="pretrained model to start from, instead of a preset")
    add("--image_size", type=_positive, help="images are brought to this side")
    add("--num_channels", type=_positive, choices=(1, 3), help="1: grey, 3: colour (default: as the data)")
    add("--patch_size", type=_positive, help="side of a square of pixels that becomes a token")
    add("--hidden_size", type=_positive, help="ViT only")
    add("--num_hidden_layers", type=_positive, help="ViT only")
    add("--num_attention_heads", type=_positive, help="ViT only")
    add("--intermediate_size", type=_positive, help="ViT only")
    add("--embed_dim", type=_positive, help="Swin only")
    add("--depths", type=_positive, nargs="+", help="Swin only")
    add("--num_heads", type=_positive, nargs="+", help="Swin only")
    add("--window_size", type=_positive, help="Swin only")
    add("--mlp_ratio", type=float, help="Swin only")
    add("--drop_path_rate", type=float, help="Swin only")
    add("--hidden_dropout_prob", type=float, help="dropout in the network")
    add("--attention_probs_dropout_prob", type=float, help="dropout of the attention")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--per_device_train_batch_size", type=_positive, help="images per process and batch (default: by data set)")
    add("--per_device_eval_batch_size", type=_positive, default=512, help="images per process and batch")
    add("--gradient_accumulation_steps", type=_positive, default=1, help="batches per optimizer step")
    add("--num_train_epochs", type=_positive, help="passes over the training images (default: by data set)")
    add("--max_train_steps", type=_positive, help="optimizer steps; overrides --num_train_epochs")
    add("--lr_scheduler_type", choices=[kind.value for kind in SchedulerType], default="cosine", help="of transformers")
    add("--num_warmup_steps", type=int, help="overrides --warmup_ratio")
    add("--warmup_ratio", type=float, default=0.1, help="share of the steps in which the learning rate rises")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0 is off")
    add("--label_smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="of the computation (default: what accelerate was configured with)",
    )
    add("--deepspeed_config", metavar="FILE", help="train with DeepSpeed; for torchrun and the deepspeed launcher")
    add("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="shampoo4",
        help="compact: no stored roots; naive: quantises the preconditioner itself",
    )
    add(
        "--learning_rate",
        type=float,
        help="peak of the schedule (default: 1e-3, or 0.1 where SGD is the rule or the base)",
    )
    add("--weight_decay", type=float, default=0.05, help="decoupled under AdamW, added to the gradient under SGD")
    add("--decay_all", action="store_true", help="decay every parameter, not only weights of linear and conv layers")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the root of the second moment")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--nesterov", action="store_true", help="the variant of SGD's momentum")


def _add_shampoo(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Shampoo (ignored by adamw and sgd)")
    add = group.add_argument
    add("--shampoo_base", choices=("adamw", "sgd"), default="adamw", help="rule that takes the preconditioned gradient")
    add("--bits", type=int, choices=(3, 4, 8), help="bits per stored element (default: 4)")
    add(
        "--codebook",
        choices=("linear2", "dynamic_tree", "normal"),
        help="the levels that elements are rounded to (default: linear2; compact: normal)",
    )
    add("--scale_dtype", choices=("float32", "bfloat16"), help="of the scales (default: float32; compact: bfloat16)")
    add(
        "--root",
        choices=("stored", "implicit"),
        help="how inverse roots are kept (default: stored; compact: implicit)",
    )
    add("--quant_block_size", type=_positive, default=64, help="elements that share a scale")
    add("--min_quant_numel", type=int, default=4096, help="a factor with fewer elements stays in float32")
    add("--shampoo_beta", type=float, default=0.95, help="decay of the statistics")
    add("--matrix_eps", type=float, default=1e-6, help="ridge, relative to the largest eigenvalue")
    add("--statistics_interval", type=_positive, default=10, help="steps between statistics")
    add("--root_interval", type=_positive, default=50, help="steps between inverse roots")
    warmup = "begin with short intervals that grow"
    add("--interval_warmup", action=argparse.BooleanOptionalAction, default=True, help=warmup)
    add(
        "--refresh",
        choices=("together", "staggered"),
        default="together",
        help="all factors in the same steps, or each at its own",
    )
    add(
        "--rectify_steps",
        type=int,
        nargs=2,
        help="before statistics, and before a root (default: 1 4; compact: 1 1)",
    )
    add("--refresh_iterations", type=int, choices=(1, 2), default=1, help="QR steps of a statistics update")
    add("--refresh_dtype", choices=("float64", "float32"), default="float64", help="arithmetic of statistics and roots")
    low = ("float32", "bfloat16")
    add("--matmul_dtype", choices=low, default="float32", help="of the products that make a direction")
    add("--exchange_dtype", choices=low, default="float32", help="of what travels between processes")
    add("--scratch_mib", type=_positive, default=256, help="memory of a step beyond the states")
    add("--compile", action="store_true", help="fuse dequantisation by torch.compile")
    add("--max_preconditioner_dim", type=_positive, default=1024, help="most rows or columns of a block")
    add("--split", choices=("even", "remainder"), default="even", help="how a long side is cut into blocks")
    add(
        "--grafting",
        choices=("parameter", "block", "none"),
        default="parameter",
        help="over what the gradient's norm is kept",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", default="runs/vit", help="results, curves, the trained model and checkpoints")
    add("--overwrite_output_dir", action="store_true", help="start anew in a used folder: removes its checkpoints")
    add("--checkpointing_steps", type=_steps_or_epoch, help="save every N steps, or 'epoch'")
    add("--checkpoints_total_limit", type=_positive, help="keep the newest N checkpoints")
    add("--resume_from_checkpoint", metavar="PATH|latest", help="latest: the newest in --output_dir, if any")
    add("--ddp_timeout", type=_positive, default=1800, help="seconds to wait for a process that does not answer")
    add("--logging_steps", type=_positive, default=10, help="optimizer steps between two lines of metrics.jsonl")
    add("--log_health", action="store_true", help="the factors' state after every epoch: health.jsonl, health.png")
    add("--with_tracking", action="store_true", help="also log to --report_to")
    add("--report_to", choices=("tensorboard",), default="tensorboard")


def _fill_defaults(args: argparse.Namespace) -> None:
    """Settle every option that was left to the data set or to the optimizer."""
    if not (args.dataset_name or args.dataset_path or args.train_dir):
        args.dataset_name = "digits"
    own_model = args.config_name or args.model_name_or_path
    for name, value in RECIPES.get(args.dataset_name, RECIPES["other"]).items():
        if getattr(args, name) is None and not (name == "model" and own_model):
            setattr(args, name, value)
    if args.learning_rate is None:
        rule = args.shampoo_base if args.optimizer.startswith("shampoo") else args.optimizer
        args.learning_rate = 0.1 if rule == "sgd" else 1e-3
    kept = {**_STORED_AS_PUBLISHED, **(Shampoo4.compact_settings() if args.optimizer == "shampoo4-compact" else {})}
    for name in _STORED_AS_PUBLISHED:
        if getattr(args, name) is None:
            setattr(args, name, kept[name])
    if args.optimizer == "shampoo32":
        args.bits = args.bits or 32
    elif args.optimizer.startswith("shampoo"):
        args.bits = args.bits or 4


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject combinations that would otherwise be ignored in silence."""
    if sum(map(bool, (args.model, args.config_name, args.model_name_or_path))) > 1:
        parser.error("give one of --model, --config_name and --model_name_or_path")
    if args.train_dir and (args.dataset_name or args.dataset_path):
        parser.error("--train_dir is a data set of its own: drop --dataset_name and --dataset_path")
    if args.validation_dir and not args.train_dir:
        parser.error("--validation_dir needs --train_dir")
    if args.optimizer == "shampoo32" and args.bits != 32:
        parser.error(f"--optimizer shampoo32 keeps 32 bits, --bits {args.bits} contradicts it")
    if (args.image_mean is None) != (args.image_std is None):
        parser.error("--image_mean and --image_std go together")
    if not 0 < args.train_val_split < 1:
        parser.error(f"--train_val_split must be between 0 and 1, got {args.train_val_split}")
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        parser.error(f"--lr_scheduler_type {args.lr_scheduler_type} needs a metric at every step")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _steps_or_epoch(text: str) -> int | str:
    return "epoch" if text == "epoch" else _positive(text)
