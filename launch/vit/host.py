"""The Accelerator of train_vit.py, for all launchers."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel
from vit.model import LAYERS

from sharded_shampoo4.integrations.accelerate import PortableAccelerator
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu

if TYPE_CHECKING:
    from vit.args import TrainingArguments


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """Make the accelerator. Only the main process writes log messages."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("train_vit").setLevel(logging.INFO)
    if args.deepspeed_config:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as accelerate launch says it
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = args.deepspeed_config
        os.environ.setdefault("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false")  # the same first weights at every stage
    timeout = timedelta(seconds=args.ddp_timeout)
    rehearse_on_cpu(timeout)
    accelerator = PortableAccelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with="tensorboard" if args.with_tracking else None,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if not accelerator.is_local_main_process:
        transformers.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    return accelerator


def check_accumulation(accelerator: Accelerator, steps: int) -> None:
    """Compare the accumulation that runs after ``prepare()`` with ``--gradient_accumulation_steps``.

    Raises:
        ValueError: they differ: the launcher and DeepSpeed's configuration override what the program says.
    """
    running, variable = accelerator.gradient_accumulation_steps, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if running != steps:
        by_launcher = os.environ.get(variable) == str(running)
        source = f"the launcher's {variable}" if by_launcher else 'DeepSpeed\'s configuration ("auto" there would do)'
        raise ValueError(f"--gradient_accumulation_steps is {steps}, but {running} in {source}: make them equal")


def choose_fsdp_units(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Let FSDP shard a ViT or Swin transformer layer by layer, unless the launch configuration names layers.

    By default Accelerate would take the model's own list, which also names ViT's embeddings. Accelerate 1.15 shards
    these twice under FSDP2 and fails.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = LAYERS.get(model.config.model_type)
