"""Complex and sparse gradients on several ranks, and what is said of layouts that Shampoo4 cannot precondition."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support.worlds import said
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_shampoo4 import Shampoo4, checkpoint

OPTIONS: dict[str, Any] = {"lr": 1e-2, "statistics_interval": 1, "root_interval": 2, "min_quant_numel": 0}


class Mixed(nn.Module):
    """A complex matrix and vector, an embedding whose gradient may be sparse, and a matrix to precondition."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6, sparse=sparse)
        self.filter = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = (self.embedding(tokens) * self.phase) @ self.filter.mT
        return self.head(torch.cat([mixed.real, mixed.imag[:, :2]], dim=1))


def make(host: str) -> tuple[nn.Module, Shampoo4]:
    model: nn.Module = Mixed(sparse=host != "fsdp2")
    if host == "fsdp2":
        fully_shard(model, mesh=hosts.make_mesh(dist.get_world_size()))
    named = dict(model.named_parameters())
    base = [(name, named.pop(name)) for name in ("embedding.weight", "filter")]
    groups = [{"params": base, "precondition": False}, {"params": list(named.items())}]
    optimizer = Shampoo4(groups, base="adagrad", **OPTIONS)
    return (DistributedDataParallel(model) if host == "ddp" else model), optimizer


def replay(model: nn.Module, host: str, step: int) -> None:
    """FSDP2 itself wants parameters of one type: these gradients are set by hand, and dense."""
    generator = torch.Generator().manual_seed(step)
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in Mixed(False).named_parameters()}
    gradients = {name: torch.randn(shape, dtype=dtype, generator=generator) for name, (shape, dtype) in shapes.items()}
    hosts.set_gradients(model, host, gradients)


def train(model: nn.Module, optimizer: Shampoo4, host: str, replayed: bool, steps: range) -> dict[str, Tensor]:
    """On every rank the same data, so that means of gradients are exact."""
    for step in steps:
        optimizer.zero_grad()
        if replayed:
            replay(model, host, step)
        else:
            generator = torch.Generator().manual_seed(step)
            model(torch.randint(10, (3,), generator=generator)).square().sum().backward()
        optimizer.step()
    return hosts.full_parameters(model, host)


def trained(rank: int, host: str, replayed: bool) -> dict[str, dict[str, Tensor]]:
    model, optimizer = make(host)
    train(model, optimizer, host, replayed, range(3))
    folder = [tempfile.mkdtemp()]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(folder)
    checkpoint.save(optimizer, folder[0], model=model)
    resumed, other = make(host)
    checkpoint.load(other, folder[0], model=resumed)
    return {
        "straight": train(model, optimizer, host, replayed, range(3, 6)),
        "resumed": train(resumed, other, host, replayed, range(3, 6)),
    }


@pytest.mark.parametrize("host", ("ddp", "fsdp2"))
def test_complex_and_sparse_gradients_of_the_base_train_under_every_host(host: str) -> None:
    (alone,) = hosts.run_ranks(1, trained, "none", host == "fsdp2")
    for found in hosts.run_ranks(2, trained, host, host == "fsdp2"):
        for way in ("straight", "resumed"):
            for name, values in alone["straight"].items():
                torch.testing.assert_close(found[way][name], values, rtol=1e-5, atol=1e-6, msg=f"{way}: {name}")
        assert all(torch.equal(found["straight"][name], found["resumed"][name]) for name in found["straight"])
