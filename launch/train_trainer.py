"""Train a small ViT on scikit-learn's digits with the Trainer of transformers and Shampoo4.

    python launch/train_trainer.py
    torchrun --nproc_per_node 2 launch/train_trainer.py
    accelerate launch --config_file launch/configs/fsdp2.yaml --fsdp_transformer_layer_cls_to_wrap ViTLayer \\
        launch/train_trainer.py
    torchrun --nproc_per_node 2 launch/train_trainer.py --deepspeed launch/configs/zero2.json

The script gives the optimizer to the Trainer, with the options of Shampoo4 on the command line. With --deepspeed, that
file names the optimizer. --resume_from_checkpoint, with a checkpoint's folder or "latest", continues a run by any of
these commands. Without a GPU they run on the CPU.
"""

from __future__ import annotations

from sharded_shampoo4.integrations.quiet import quiet

quiet()  # before the imports of packages that give warnings

import argparse
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import EvalPrediction, HfArgumentParser, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import set_seed

from sharded_shampoo4.arguments import Shampoo4Arguments
from sharded_shampoo4.integrations.rehearsal import describe_distribution, inner_optimizer, rehearse_on_cpu
from sharded_shampoo4.integrations.transformers import PortableTrainer, shampoo4


@dataclass
class ExampleArguments:
    """Options beside the Trainer's own."""

    num_hidden_layers: int = field(default=4, metadata={"help": "of the ViT"})


DEFAULTS = {
    "output_dir": "runs/trainer",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "use_cpu": not torch.accelerator.is_available(),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the text above unchanged, and every default."""


def parse_args() -> tuple[ExampleArguments, Any, TrainingArguments]:
    """Parse the command line. The rehearsal comes before TrainingArguments, which start the process group."""
    kinds = (ExampleArguments, Shampoo4Arguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, usage="%(prog)s [options]", formatter_class=Help)
    parser.set_defaults(**DEFAULTS)
    if parser.parse_args().deepspeed:
        import sharded_shampoo4.integrations.deepspeed  # noqa: F401  makes "Shampoo4" a type of optimizer

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as accelerate launch says it
    parser.set_defaults(accelerator_config={"use_configured_state": rehearse_on_cpu()})
    return parser.parse_args_into_dataclasses()


def digits() -> list[list[dict[str, Any]]]:
    """Load images of 8x8 gray pixels, split by class: four fifths for training, one for evaluation."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).div(8).sub(1).reshape(-1, 1, 8, 8)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    return train_test_split(items, test_size=0.2, stratify=labels, random_state=0)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose class is predicted."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    """Train, and print the accuracy on the evaluation images."""
    logging.basicConfig(level=logging.WARNING)
    example, shampoo, args = parse_args()
    set_seed(args.seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, num_hidden_layers=example.num_hidden_layers, **sizes
    )
    training, evaluation = digits()
    trainer = PortableTrainer(
        ViTForImageClassification(config),
        args,
        train_dataset=training,
        eval_dataset=evaluation,
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=None if args.deepspeed else shampoo4(args, **shampoo.given()),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "latest" else resume)
    host = describe_distribution(trainer.accelerator, trainer.model_wrapped)
    optimizer = inner_optimizer(trainer.accelerator, trainer.model_wrapped, trainer.optimizer)
    found = trainer.evaluate()["eval_accuracy"]
    trainer.accelerator.print(f"{host}, {type(optimizer).__name__}: {found:.2%} of the evaluation images")


if __name__ == "__main__":
    main()
