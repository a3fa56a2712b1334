"""DeepSpeed's engines for the contract suite: real ZeRO at every stage, on gloo, with gradients to replay.

``worlds.py`` starts the processes and makes the models. Gradients go the whole way through DeepSpeed: each rank's
backward pass makes them, and DeepSpeed scales, reduces, accumulates and partitions them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, safe_get_full_fp32_param
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_shampoo4.integrations.deepspeed import skip_cpu_compilation

HOSTS = ("zero0", "zero1", "zero2", "zero3")

logger.setLevel(logging.ERROR)


def prepare() -> None:
    """Once in every rank, after its process group has been made."""
    skip_cpu_compilation()
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    for name, value in (
        ("RANK", dist.get_rank()),
        ("LOCAL_RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
    ):
        os.environ[name] = str(value)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)


class Replay(nn.Module):
    """A model's parameters, under their names, in modules whose gradients are what ``replay`` says."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.gradients: dict[str, Tensor] = {}
        for name, parameter in model._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in model._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
        for name, child in model.named_children():
            self.add_module(name, Replay(child))

    def forward(self) -> Tensor:
        """A loss whose gradients are the replayed ones, exactly: the sum of the parameters times them."""
        total = torch.zeros(())
        for name, gradient in self.gradients.items():
            total = total + (getattr(self, name).float() * gradient).sum()
        for child in self.children():
            total = total + child()
        return total

    def replay(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Take these gradients at the next backward passes; parameters with None take no part in the loss."""
        modules = dict(self.named_modules())
        for module in modules.values():
            module.gradients = {}
        for name, gradient in gradients.items():
            if gradient is not None:
                path, _, leaf = name.rpartition(".")
                modules[path].gradients[leaf] = gradient.float()


def configuration(host: str, **options: Any) -> dict[str, Any]:
    """A DeepSpeed configuration; ``zero`` in ``options`` goes to ``zero_optimization``."""
    zero = {"stage": int(host.removeprefix("zero")), **options.pop("zero", {})}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero, **options}


def pretend_fp16() -> None:
    """Have DeepSpeed believe that this device computes in float16: some CPUs do so natively only, torch on all."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def start(
    model: nn.Module,
    config: Mapping[str, Any],
    optimizer: Optimizer | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> Any:
    """An engine; without ``optimizer``, with the one that ``config`` names, on ``groups`` or all parameters."""
    chosen = {"optimizer": optimizer} if optimizer else {"model_parameters": groups or model.parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=dict(config), dist_init_required=False, **chosen)
    return engine


def step(engine: Any, gradients: Mapping[str, Tensor | None]) -> None:
    """One optimizer step on replayed gradients, in as many micro-batches as the configuration asks for."""
    engine.module.replay(gradients)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine())
        engine.step()


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Copies of the whole weights on every rank; collective."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def master_parameters(engine: Any) -> dict[str, Tensor]:
    """Copies of the trained weights as the optimizer has them, in float32; collective. Not at stage 0."""
    trained = ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained}
