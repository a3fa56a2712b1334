"""The contract's cases: a model, options, and gradients that every host replays.

Every host gets its shards of the same global gradients, so nothing but the optimizer is compared.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations import fsdp

from . import worlds as hosts
from . import zero_worlds as zero

STEPS = 9
FAST: dict[str, Any] = {
    "method": "shampoo",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "statistics_interval": 2,
    "root_interval": 4,
}
SMALL_BLOCKS: dict[str, Any] = {
    "method": "shampoo",
    "lr": 0.01,
    "statistics_interval": 2,
    "root_interval": 4,
    "max_preconditioner_dim": 30,
    "min_quant_numel": 0,
}
PATIENCE = timedelta(seconds=3)  # of groups that are meant to wait in vain
# Name: kind of model, options. Blocks of at most 30 put several owners' blocks into one parameter.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"min_quant_numel": 0}),
    "mlp, blocks": ("mlp", {"max_preconditioner_dim": 30, "min_quant_numel": 0}),
    "vit, blocks, remainder": ("vit", {"max_preconditioner_dim": 30, "split": "remainder"}),
    "vit, SGD, block grafting": ("vit", {"base": "sgd", "momentum": 0.9, "grafting": "block"}),
    "tied, naive": ("tied", {"quantize": "preconditioner", "min_quant_numel": 0}),
    "tied, groups": ("tied", {"max_preconditioner_dim": 17, "split_groups": True}),
    "bf16": ("bf16", {"max_preconditioner_dim": 40, "min_quant_numel": 0}),
    "mlp, blocks, compact": (
        "mlp",
        {"max_preconditioner_dim": 30, "min_quant_numel": 0, "refresh": "staggered", "preset": "shampoo-compact"},
    ),
    "mlp, blocks, bfloat16 on the way": (
        "mlp",
        {"max_preconditioner_dim": 30, "min_quant_numel": 0, "exchange_dtype": "bfloat16", "matmul_dtype": "bfloat16"},
    ),
    "tied, implicit roots, staggered": (
        "tied", {"max_preconditioner_dim": 25, "min_quant_numel": 0, "refresh": "staggered", "root": "implicit"}
    ),
    "mlp, blocks, soap": (
        "mlp",
        {
            "method": "soap", "soap_betas": (0.95, 0.95), "momentum_dtype": "float32", "max_preconditioner_dim": 30,
            "min_quant_numel": 0,
        },
    ),
    "tied, groups, soap": (
        "tied",
        {
            "method": "soap", "soap_betas": (0.95, 0.95), "second_moment_dtype": "factored",
            "max_preconditioner_dim": 17, "split_groups": True,
        },
    ),
    "vit, soap, 4 bits, staggered": (
        "vit",
        {
            "method": "soap", "bits": 4, "codebook": "normal", "refresh": "staggered", "max_preconditioner_dim": 40,
            "momentum_dtype": "int8", "second_moment_dtype": "int8", "soap_betas": (0.95, 0.95), "min_quant_numel": 0,
        },
    ),
    "bf16, soap": (
        "bf16",
        {"method": "soap", "newton_schulz_steps": 3, "min_quant_numel": 0},
    ),
    "experts, heads": ("experts", {"max_preconditioner_dim": 16, "min_quant_numel": 100, "heads": True}),
    "experts, heads, soap": (
        "experts",
        {"method": "soap", "bits": 4, "max_preconditioner_dim": 16, "min_quant_numel": 100, "heads": True},
    ),
    "mlp, 32 bits": ("mlp", {"bits": 32, "max_preconditioner_dim": 25, "grafting": "none"}),
}  # fmt: skip


def make_optimizer(model: torch.nn.Module, host: str, options: dict[str, Any]) -> Shampoo4:
    options = {**FAST, **options}
    if options.get("method") == "soap":
        del options["root_interval"]
    named = list(hosts.named(model, host).items())
    if options.pop("heads", False):
        qkv = [(name, parameter) for name, parameter in named if name == "qkv.weight"]
        others = [(name, parameter) for name, parameter in named if name != "qkv.weight"]
        optimizer = Shampoo4([{"params": qkv, "split_rows": (48, 24, 24)}, {"params": others}], **options)
    elif options.pop("split_groups", False):
        half = len(named) // 2
        groups = [{"params": named[:half], "bits": 8, "statistics_interval": 3}, {"params": named[half:], "lr": 1e-3}]
        if options.get("method") == "soap":
            groups[0].update(method="shampoo", root_interval=3)
        optimizer = Shampoo4(groups, **options)
    else:
        optimizer = Shampoo4(named, **options)
    if host == "fsdp1":
        fsdp.bind(optimizer, model)
    return optimizer


def make_gradients(kind: str, step: int) -> dict[str, Tensor | None]:
    """In step 5 one parameter has none."""
    gradients = hosts.make_gradients(kind, step)
    if step == 5:
        gradients[max(gradients)] = None
    return gradients


def make_gradients_for_zero(kind: str, step: int) -> dict[str, Tensor | None]:
    """The same, with zeros for a parameter that has one in other steps: DeepSpeed 0.19.8 takes its last one again."""
    gradients = make_gradients(kind, step)
    usual = hosts.make_gradients(kind, step)
    missing = {
        key: torch.zeros_like(usual[key]) for key in gradients if gradients[key] is None and usual[key] is not None
    }
    return {**gradients, **missing}


def train_case(host: str, name: str, **changed: Any) -> tuple[Any, Shampoo4]:
    """Replay the gradients of a case under a host. Returns the wrapped model, or DeepSpeed's engine, and the optimizer.

    ``changed`` are options that take the place of the case's own.
    """
    kind, options = CASES[name]
    model, options = hosts.make_model(kind), {**options, **changed}
    if not host.startswith("zero"):
        model = hosts.wrap(model, host)
        optimizer = make_optimizer(model, host, options)
        for step in range(STEPS):
            hosts.set_gradients(model, host, make_gradients(kind, step))
            optimizer.step()
        return model, optimizer
    optimizer = make_optimizer(model, "none", options)
    config = zero.configuration(host, **({"bf16": {"enabled": True}} if kind == "bf16" else {}))
    engine = zero.start(zero.Replay(model), config, optimizer)
    for step in range(STEPS):
        zero.step(engine, make_gradients_for_zero(kind, step))
    return engine, optimizer


def train_case_as_zero_does(name: str, **changed: Any) -> tuple[torch.nn.Module, Shampoo4]:
    """In one process, what DeepSpeed does elsewhere: gradients of zeros for None, and float32 copies of weights."""
    kind, options = CASES[name]
    masters = hosts.make_model(kind).float()
    optimizer = make_optimizer(masters, "none", {**options, **changed})
    for step in range(STEPS):
        gradients = make_gradients(kind, step)
        for key, parameter in masters.named_parameters():
            gradient = gradients[key]
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.float()
        optimizer.step()
    return masters, optimizer
