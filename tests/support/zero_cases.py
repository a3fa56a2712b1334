"""Configurations of DeepSpeed: engines in all the ways that people set them up."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharded_shampoo4 import Shampoo4

from . import worlds as hosts
from . import zero_worlds as zero

STEPS = 10
OPTIONS: dict[str, Any] = {
    "method": "shampoo",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "statistics_interval": 2,
    "root_interval": 4,
    "max_preconditioner_dim": 30,
    "min_quant_numel": 0,
}
SOAP = {**{name: value for name, value in OPTIONS.items() if name != "root_interval"}, "method": "soap"}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1000, "hysteresis": 1}}
CPU = {"device": "cpu", "pin_memory": False}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 8, "warmup_type": "linear"}}


@dataclass
class Case:
    """A configuration of DeepSpeed; ``optimizer`` says who makes the optimizer."""

    host: str
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "mlp"
    optimizer: str = (
        "configuration"  # | "program" | "groups": groups of the program's, the optimizer of the configuration
    )
    zero_init: bool = False
    overflow: int | None = None  # a step whose gradients overflow
    steps: int = STEPS
    method: str = "shampoo"

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's."""
        return SOAP if self.method == "soap" else OPTIONS


def everywhere(
    name: str, stages: str, zero_options: dict[str, Any] | None = None, steps: int = STEPS, **config: Any
) -> dict[str, Case]:
    zero_part = {"zero": zero_options} if zero_options else {}
    return {f"{name}, stage {n}": Case(f"zero{n}", {**config, **zero_part}, steps=steps) for n in stages}


CASES: dict[str, Case] = {
    **everywhere("one micro-batch", "0123", steps=20),
    **everywhere("four micro-batches", "0123", steps=20, gradient_accumulation_steps=4),
    **everywhere("round robin", "12", {"round_robin_gradients": True}),
    **everywhere("aligned parameters", "12", {"parameter_alignment": True}),
    **everywhere("overlapping communication", "123", {"overlap_comm": True}),
    **everywhere("gradients not contiguous", "1", {"contiguous_gradients": False}),
    **everywhere("small buckets", "123", {"reduce_bucket_size": 500, "allgather_bucket_size": 500}),
    **everywhere("offloaded optimizer", "123", {"offload_optimizer": CPU}),
    **everywhere("offloaded, four micro-batches", "123", {"offload_optimizer": CPU}, gradient_accumulation_steps=4),
    **everywhere("offloaded parameters", "3", {"offload_optimizer": CPU, "offload_param": CPU}),
    **everywhere("small sub-groups", "3", {"sub_group_size": 64}),
    **everywhere("no persistent parameters", "3", {"param_persistence_threshold": 0}),
    **everywhere("learning rate from a schedule", "0123", scheduler=WARMUP),
    **{f"groups, stage {n}": Case(f"zero{n}", optimizer="groups") for n in range(4)},
    "sub-groups of groups, stage 3": Case("zero3", {"zero": {"sub_group_size": 64}}, optimizer="groups"),
    **{f"the program's optimizer, stage {n}": Case(f"zero{n}", optimizer="program") for n in range(4)},
    "the program's optimizer, offloaded": Case(
        "zero2", {"zero": {"offload_optimizer": CPU}, "zero_force_ds_cpu_optimizer": False}, optimizer="program"
    ),
    **{f"a ViT, stage {n}": Case(f"zero{n}", {"zero": {"round_robin_gradients": n == 2}}, "vit") for n in range(4)},
    **{f"bf16, stage {n}": Case(f"zero{n}", BF16, "bf16") for n in range(4)},
    "bf16 with gradients in float32": Case("zero1", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16"),
    "bf16, groups, gradients in float32": Case(
        "zero1", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16", "groups"
    ),
    "bf16, offloaded": Case("zero2", {**BF16, "zero": {"offload_optimizer": CPU}}, "bf16"),
    # At stage 0 DeepSpeed 0.19.8 divides gradients by a scale that it has not multiplied the loss by.
    "fp16, stage 0": Case("zero0", {"fp16": {"enabled": True, "loss_scale": 1.0}}, "fp16", overflow=5),
    **{f"fp16, stage {n}": Case(f"zero{n}", FP16, "fp16", overflow=5) for n in (1, 2, 3)},
    "fp16, offloaded": Case("zero3", {**FP16, "zero": {"offload_optimizer": CPU}}, "fp16", overflow=5),
    "zero.Init": Case("zero3", zero_init=True),
    "zero.Init of a ViT": Case("zero3", {"zero": {"sub_group_size": 4000}}, "vit", zero_init=True),
}
CASES |= {
    f"{name}, soap": dataclasses.replace(CASES[name], method="soap")
    for name in (
        *(f"groups, stage {n}" for n in range(4)),
        "small sub-groups, stage 3",
        "offloaded parameters, stage 3",
        "bf16 with gradients in float32",
        "fp16, stage 3",
        "zero.Init of a ViT",
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(case: Case) -> torch.nn.Module:
    return hosts.make_model("mlp").to(DTYPES[case.kind]) if case.kind in DTYPES else hosts.make_model(case.kind)


def make_gradients(case: Case, step: int) -> dict[str, Tensor | None]:
    gradients = hosts.make_gradients("bf16" if case.kind in DTYPES else case.kind, step)
    if case.kind == "fp16":  # at stage 0 DeepSpeed adds up squares of norms in float16: they must be small
        gradients = {name: gradient.float() / 64 for name, gradient in gradients.items()}
    return gradients


def groups_of(named: list[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    """Matrices in two groups, one with other options, and everything else in a third."""
    return [
        {"params": [p for n, p in named if p.dim() > 1 and "middle" not in n], "weight_decay": 0.3},
        {"params": [p for n, p in named if p.dim() > 1 and "middle" in n], "bits": 8, "statistics_interval": 3},
        {"params": [p for n, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


def start(case: Case) -> Any:
    """An engine as ``case`` wants it."""
    config = zero.configuration(case.host, **copy.deepcopy(case.config))
    if case.optimizer != "program":
        config["optimizer"] = {"type": "Shampoo4", "params": case.options}
    if case.zero_init:
        with zero.deepspeed.zero.Init(config_dict_or_path=config):
            model = make_model(case)
    else:
        model = make_model(case)
    replay = zero.Replay(model)
    if case.optimizer == "groups":
        return zero.start(replay, config, groups=groups_of(list(replay.named_parameters())))
    optimizer = Shampoo4(replay.named_parameters(), **case.options) if case.optimizer == "program" else None
    return zero.start(replay, config, optimizer)


def train(engine: Any, case: Case, steps: range) -> list[float]:
    """Replay gradients; returns the learning rates."""
    rates = []
    for step in steps:
        rates.append(engine.get_lr()[0])
        gradients = make_gradients(case, step)
        if step == case.overflow:
            gradients["stem.bias"] = torch.full_like(gradients["stem.bias"], float("inf"))
        zero.step(engine, gradients)
    return rates
