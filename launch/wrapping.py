"""A model as a host holds it, for the scripts that measure: DDP, FSDP2 or HSDP by PyTorch alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def wrap(
    model: nn.Module, host: str, units: Iterable[nn.Module], *, copies: int = 1, device_type: str = "cpu"
) -> nn.Module:
    """``model`` under ``host``, which is ``"ddp"``, ``"fsdp2"`` or ``"hsdp"``, on all ranks of the default group.

    ``units`` are the modules that FSDP2 and HSDP shard each by itself, ``copies`` the complete ones that HSDP keeps.
    """
    if host == "ddp":
        return DistributedDataParallel(model)
    ranks = dist.get_world_size()
    shape, names = ((copies, ranks // copies), ("replicate", "shard")) if host == "hsdp" else ((ranks,), ("shard",))
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    for module in (*units, model):
        fully_shard(module, mesh=mesh)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a ViT, which FSDP gathers one at a time."""
    return [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
