"""Run by ``torchrun`` in test_trainer.py: the Trainer with 4-bit Shampoo, uninterrupted and resumed, under one host.

    torchrun --nproc_per_node 2 tests/trainer_script.py FOLDER {ddp,fsdp2,zero2,zero3}

Process 0 writes FOLDER/result.json: for every process and way of saving, what ran and the log lines of both runs.

    torchrun --nproc_per_node {1,2} tests/trainer_script.py FOLDER moves BASE

resumes, in the same way, portable checkpoints of BASE/HOST/portable under other hosts.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import sharded_shampoo4.integrations.deepspeed  # noqa: F401  makes "Shampoo4" a type of optimizer
from sharded_shampoo4.integrations.accelerate import consolidate
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu
from sharded_shampoo4.integrations.transformers import ConsolidateStates, LogOptimizer, PortableTrainer, shampoo4
from sharded_shampoo4.state_dict import own_pieces

TIME_OUT = 240  # seconds
STEPS, SAVED = 24, 9  # saved between two refreshes of the factors and between two of the roots
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
# How the host saves: by the Trainer itself, and in the ways of FSDP (the first is the Trainer's choice).
PORTABLE = "portable"  # by PortableTrainer
IN_32_BITS = "32 bits"  # the same, only trained: no code can turn that would hide a difference between hosts
WAYS = {
    "ddp": ("own", PORTABLE),
    "fsdp2": ("FULL_STATE_DICT", "SHARDED_STATE_DICT", PORTABLE),
    "zero2": ("own", PORTABLE),
    "zero3": ("own", PORTABLE),
}
# By the number of processes that go on: what two processes have saved, and where it goes on.
MOVES = {
    1: (("fsdp2", "ddp"), ("zero3", "ddp"), ("ddp", "zero2")),
    2: (("ddp", "fsdp2"), ("zero2", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "ddp")),
}
ARGUMENTS: dict[str, Any] = {
    "logging_steps": 1,
    "per_device_train_batch_size": 16,  # on two processes
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
INTERVALS: dict[str, Any] = {"method": "shampoo", "statistics_interval": 2, "root_interval": 4}


class Classifier(nn.Module):
    """Around a ViT, which the Trainer of transformers 5.23 saves under other names than it loads."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
        self.net = ViTForImageClassification(config)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.net(pixel_values=pixel_values, labels=labels)


def digits() -> list[dict[str, Any]]:
    """Zeros and ones, which few steps learn; whole batches of 32, so that no process fills one up."""
    images, labels = load_digits(n_class=2, return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    pairs = zip(pixels[:352], labels[:352], strict=True)
    return [{"pixel_values": image, "labels": int(label)} for image, label in pairs]


def deepspeed_configuration(stage: int) -> dict[str, Any]:
    """All that a user writes; the Trainer settles the rest by its own arguments."""
    return {
        "optimizer": {"type": "Shampoo4", "params": {"lr": "auto", "weight_decay": "auto", **INTERVALS}},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


class Asking(TrainerCallback):
    """Asks for the optimizer's state at the end of the first step, before anything has made it whole."""

    answer = "given"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1:
            try:
                kwargs["optimizer"].state_dict()
            except RuntimeError as error:
                self.answer = str(error)


def make_trainer(folder: Path, host: str, way: str, seed: int, *callbacks: TrainerCallback) -> Trainer:
    """What a process that has just started makes. Accelerate's state would outlive the Trainer before it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    by_deepspeed, by_fsdp = host.startswith("zero"), host.startswith("fsdp")
    # As accelerate launch sets them, and torchrun and the deepspeed launcher do not.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(by_deepspeed).lower()
    os.environ["ACCELERATE_USE_FSDP"] = str(by_fsdp).lower()
    assert rehearse_on_cpu()
    torch.manual_seed(seed)
    fsdp = {"transformer_layer_cls_to_wrap": ["ViTLayer"]}
    portable = way in (PORTABLE, IN_32_BITS)
    if not portable:
        fsdp["state_dict_type"] = way
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        **{**ARGUMENTS, "per_device_train_batch_size": 32 // PartialState().num_processes},
        accelerator_config={"use_configured_state": True},  # what rehearse_on_cpu() has set up
        fsdp=by_fsdp,
        fsdp_config=fsdp if by_fsdp else None,
        deepspeed=deepspeed_configuration(int(host[-1])) if by_deepspeed else None,
    )
    options = {**INTERVALS, "bits": 32 if way == IN_32_BITS else 4}
    return (PortableTrainer if portable else Trainer)(
        Classifier(),
        args,
        train_dataset=digits(),
        optimizer_cls_and_kwargs=None if by_deepspeed else shampoo4(args, **options),
        callbacks=[*callbacks, *(() if portable else (ConsolidateStates(),))],
    )


def lines(trainer: Trainer) -> list[dict[str, float]]:
    """Step, loss and gradient norm of every step."""
    kept = ("step", "loss", "grad_norm")
    return [{name: float(line[name]) for name in kept} for line in trainer.state.log_history if "grad_norm" in line]


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter and every packed preconditioner, gathered. Collective."""
    engine: Any = trainer.model_wrapped
    if hasattr(engine, "basic_optimizer"):  # DeepSpeed's: every process has a part of the preconditioners
        pieces = own_pieces(engine.basic_optimizer._session)
        parameters = dict(engine.named_parameters())
        with deepspeed.zero.GatheredParameters(
            list(parameters.values()), enabled=engine.zero_optimization_stage() == 3
        ):
            copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return {**{f"preconditioner {place}": piece["data"] for place, piece in pieces.items()}, **copies}
    optimizer: Any = trainer.optimizer
    consolidate(optimizer)
    state = optimizer.state_dict()["state"]
    packed = {
        f"preconditioner {key}": held["preconditioner"] for key, held in state.items() if "preconditioner" in held
    }
    values = {**packed, **dict(trainer.model_wrapped.named_parameters())}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}


def train_and_resume(folder: Path, host: str, way: str) -> dict[str, Any]:
    asking = Asking()
    full = make_trainer(folder, host, way, 0, asking)
    full.add_callback(LogOptimizer(full))
    full.train()
    resumed = make_trainer(folder, host, way, 1)  # other weights, which the checkpoint must replace
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))

    engine: Any = full.model_wrapped
    optimizer: Any = getattr(engine, "basic_optimizer", None) or full.optimizer.optimizer
    parameters = list(full.model_wrapped.parameters())
    in_place = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [p for _, p, _ in optimizer._members.given()] if host.startswith("zero") else in_place
    values, again = whole(full), whole(resumed)
    return {
        "files": sorted(path.name for path in (folder / f"checkpoint-{SAVED}").iterdir()),
        "distributed_type": full.accelerator.distributed_type.value,
        "optimizer": type(optimizer).__name__,
        "stage": engine.zero_optimization_stage() if host.startswith("zero") else None,
        "trains_the_model": {*map(id, parameters)} == {*map(id, trained)},
        "parameters": len(parameters),
        "dtensors": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "wrapped_in_ddp": isinstance(full.model_wrapped, DistributedDataParallel),
        "state_bytes": optimizer.state_bytes(),
        "asked_for_states": asking.answer,
        "full": lines(full),
        "figures": [line for line in full.state.log_history if "optimizer_failures" in line],
        "resumed": lines(resumed),
        "preconditioners": sum(name.startswith("preconditioner") for name in values),
        "differences": [name for name in values if not torch.equal(values[name], again[name])],
    }


def move(folder: Path, base: Path, source: str, target: str) -> list[dict[str, float]]:
    """The log lines of a run that has begun under ``source``, and goes on here under ``target``."""
    resumed = make_trainer(folder / f"{source} {target}", target, PORTABLE, 1)
    resumed.train(resume_from_checkpoint=str(base / source / PORTABLE / f"checkpoint-{SAVED}"))
    return lines(resumed)


def main(folder: Path, host: str, base: Path) -> None:
    faulthandler.dump_traceback_later(TIME_OUT, exit=True)  # the launcher then ends the other process
    warnings.simplefilter("ignore")
    found: dict[str, Any]
    if host == "moves":
        moves = MOVES[int(os.environ["WORLD_SIZE"])]
        found = {f"{source} to {target}": move(folder, base, source, target) for source, target in moves}
    else:
        found = {way: train_and_resume(folder / way, host, way) for way in WAYS[host]}
        if not host.startswith("zero"):
            trainer = make_trainer(folder / IN_32_BITS, host, IN_32_BITS, 0)
            trainer.train()
            found[IN_32_BITS] = lines(trainer)
    state = PartialState()
    results: list[Any] = [None] * state.num_processes
    torch.distributed.all_gather_object(results, found)
    if state.is_main_process:
        (folder / "result.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[-1]))
