"""Optimizers of train_vit.py: parameter groups, construction, and the bytes of their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DummyOptim
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from vit.model import decays

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.options import DEFAULTS
from sharded_shampoo4.presets import apply_preset

if TYPE_CHECKING:
    from vit.args import Arguments, TrainingArguments

# Names for --optimizer, and the options of Shampoo4 that they stand for.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "shampoo4": {},
    "shampoo4-compact": {"preset": "compact"},
    "shampoo4-paper": {"method": "shampoo"},
    "shampoo4-naive": {"method": "shampoo", "quantize": "preconditioner"},
    "shampoo32": {"method": "shampoo", "bits": 32},
    "adamw": {},
    "sgd": {},
}


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Put named parameters in one group with decay and one without. Empty groups are left out."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, _ in named} if decay_all else decays(model)
    groups = [
        {"params": [item for item in named if item[0] in decayed], "weight_decay": weight_decay},
        {"params": [item for item in named if item[0] not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    args: Arguments, model: nn.Module, total_steps: int | None = None, by_deepspeed: dict[str, Any] | None = None
) -> Optimizer | DummyOptim:
    """Make the optimizer that ``--optimizer`` names.

    Args:
        args: the options.
        model: the model to train.
        total_steps: of the run. Shampoo4 warns of intervals that are too long for it.
        by_deepspeed: the optimizer that DeepSpeed's configuration names. Returns Accelerate's stand-in for it, with
            the learning rate and weight decay for "auto" in the configuration. A number there is the groups' decay.
    """
    training = args.training
    stated = (by_deepspeed or {}).get("params", {}).get("weight_decay", "auto")
    decay = training.weight_decay if stated == "auto" else stated
    groups = parameter_groups(model, decay, training.decay_all)
    if by_deepspeed is not None:
        unnamed = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
        return DummyOptim(unnamed, lr=training.learning_rate, weight_decay=training.weight_decay)
    if training.optimizer == "adamw":
        return AdamW(groups, lr=training.learning_rate, **base_options(training, "adamw"))
    if training.optimizer == "sgd":
        return SGD(groups, lr=training.learning_rate, **base_options(training, "sgd"))
    return Shampoo4(groups, lr=training.learning_rate, total_steps=total_steps, **shampoo_options(args))


def shampoo_options(args: Arguments) -> dict[str, Any]:
    """Return the options of ``Shampoo4`` and of its base."""
    base = args.training.shampoo_base
    return {"base": base, **args.shampoo, **base_options(args.training, base)}


def is_soap(options: dict[str, Any]) -> bool:
    """Tell whether options of ``Shampoo4`` mean method="soap"."""
    method: str = apply_preset(options).get("method", DEFAULTS["method"])
    return method == "soap"


def base_options(args: TrainingArguments, rule: str) -> dict[str, Any]:
    """Return the options of AdamW or SGD."""
    if rule == "sgd":
        return {"momentum": args.momentum, "nesterov": args.nesterov}
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Count the bytes of this rank's optimizer states: ``preconditioner`` and ``base``."""
    if isinstance(optimizer, Shampoo4):
        return optimizer.state_bytes()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    local = (value.to_local() if hasattr(value, "to_local") else value for value in states)  # of a DTensor: its shard
    return {"preconditioner": 0, "base": sum(tensor.nbytes for tensor in local)}


def estimated_bytes(
    args: Arguments, shapes: Sequence[tuple[str, torch.Size]], host: str, processes: int
) -> dict[str, dict[str, int]]:
    """Estimate the bytes of AdamW alone, and of the same method in float32, on the process that keeps most.

    Args:
        args: the options of the run.
        shapes: names and shapes of its parameters.
        host: the result of ``describe_distribution``.
        processes: number of processes.
    """
    kinds = {"DDP": "ddp", "HSDP": "hsdp", "ZeRO-0": "zero0", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
    where: dict[str, Any] = {}
    if processes > 1:
        kind, *mesh = host.split()
        where = {"world_size": processes, "host": kinds.get(kind, "fsdp2")}
        if kind == "HSDP":
            where["replicas"] = int(mesh[0].split("x")[0])
    own, found = shampoo_options(args), {}
    if is_soap(own):
        full = {**own, "bits": 32, "momentum_dtype": "float32", "second_moment_dtype": "float32"}
    else:
        full = {**own, "bits": 32, "root": "stored"}
    for name, options in (("adamw", {"base": "adamw", "precondition": False}), ("float32", full)):
        estimate = estimate_memory(shapes, **options, **where)
        most = max(range(len(estimate.total)), key=estimate.total.__getitem__)
        found[name] = {"preconditioner": estimate.preconditioner[most], "base": estimate.base[most]}
    return found
