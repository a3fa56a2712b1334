"""Optimizers of train_vit.py: parameter groups, construction, and what their states weigh."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DummyOptim
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from vit_model import decays

from sharded_shampoo4 import Shampoo4, estimate_memory

_SHAMPOO_FLAGS = (
    "bits",
    "codebook",
    "quant_block_size",
    "scale_dtype",
    "root",
    "min_quant_numel",
    "shampoo_beta",
    "matrix_eps",
    "statistics_interval",
    "root_interval",
    "interval_warmup",
    "refresh",
    "refresh_iterations",
    "refresh_dtype",
    "matmul_dtype",
    "exchange_dtype",
    "scratch_mib",
    "compile",
    "max_preconditioner_dim",
    "split",
    "grafting",
)


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Named parameters in one group with decay and one without; an empty group is left out."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, _ in named} if decay_all else decays(model)
    groups = [
        {"params": [item for item in named if item[0] in decayed], "weight_decay": weight_decay},
        {"params": [item for item in named if item[0] not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, named_elsewhere: bool = False
) -> Optimizer | DummyOptim:
    """The optimizer that ``--optimizer`` names, over ``model``'s parameters.

    ``named_elsewhere``: in DeepSpeed's configuration, which makes it of what the stand-in holds. "auto" there takes
    ``--learning_rate`` and ``--weight_decay``.
    """
    groups = parameter_groups(model, args.weight_decay, args.decay_all)
    if named_elsewhere:
        unnamed = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
        return DummyOptim(unnamed, lr=args.learning_rate, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return AdamW(groups, lr=args.learning_rate, **_base_options(args, "adamw"))
    if args.optimizer == "sgd":
        return SGD(groups, lr=args.learning_rate, **_base_options(args, "sgd"))
    return Shampoo4(groups, lr=args.learning_rate, **shampoo_options(args))


def shampoo_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``Shampoo4`` that the command line asks for, those of its base among them."""
    return {
        "base": args.shampoo_base,
        "quantize": "preconditioner" if args.optimizer == "shampoo4-naive" else "eigenbasis",
        "rectify_steps": tuple(args.rectify_steps),
        **{name: getattr(args, name) for name in _SHAMPOO_FLAGS},
        **_base_options(args, args.shampoo_base),
    }


def _base_options(args: argparse.Namespace, rule: str) -> dict[str, Any]:
    if rule == "sgd":
        return {"momentum": args.momentum, "nesterov": args.nesterov}
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes that this rank's optimizer keeps: ``preconditioner`` and ``base``."""
    if isinstance(optimizer, Shampoo4):
        return optimizer.state_bytes()
    states = (value for state in optimizer.state.values() for value in state.values())
    return {"preconditioner": 0, "base": sum(_local_bytes(value) for value in states if isinstance(value, Tensor))}


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor: this rank's shard of it
    return local.numel() * local.element_size()


def estimated_bytes(
    args: argparse.Namespace, shapes: Sequence[tuple[str, torch.Size]], host: str, processes: int
) -> Mapping[str, dict[str, int]]:
    """What AdamW alone, and 32-bit Shampoo, would keep for parameters of these shapes: on the process with most."""
    where = _where(host, processes)
    with_32_bits = shampoo_options(
        argparse.Namespace(**{**vars(args), "bits": 32, "root": "stored", "optimizer": "shampoo32"})
    )
    adamw = {"base": "adamw", "precondition": False}
    return {
        name: _estimate(shapes, {**options, **where})
        for name, options in (("adamw", adamw), ("shampoo32", with_32_bits))
    }


def _estimate(shapes: Sequence[tuple[str, torch.Size]], options: dict[str, Any]) -> dict[str, int]:
    estimate = estimate_memory(shapes, **options)
    most = max(range(len(estimate.total)), key=estimate.total.__getitem__)
    return {"preconditioner": estimate.preconditioner[most], "base": estimate.base[most]}


def _where(host: str, processes: int) -> dict[str, Any]:
    """The options of ``estimate_memory`` for a host as ``describe_distribution`` tells it."""
    if processes == 1:
        return {}
    if host.startswith("HSDP"):
        return {"world_size": processes, "host": "hsdp", "replicas": int(host.split()[1].split("x")[0])}
    known = {"DDP": "ddp", "ZeRO-0": "zero0", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
    return {"world_size": processes, "host": known.get(host.split()[0], "fsdp2")}
