"""Complex and sparse gradients on several ranks, and what is said of layouts that Shampoo4 cannot precondition."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support import zero_worlds as zero
from support.worlds import said
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from sharded_shampoo4 import Shampoo4, checkpoint

OPTIONS: dict[str, Any] = {"lr": 1e-2, "statistics_interval": 1, "min_quant_numel": 0}


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


def shared_folder() -> str:
    """A new folder of rank 0's, on every rank."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


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
    folder = shared_folder()
    checkpoint.save(optimizer, folder, model=model)
    resumed, other = make(host)
    checkpoint.load(other, folder, model=resumed)
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


# -- layouts that cannot be preconditioned -----------------------------------------------------------------------------

TRAINED = {"in both": (4, 4, 6), "strided": (8, 6), "by rows": (8, 6)}


def laid_out() -> dict[str, DTensor]:
    """Weights by name: one cut in its last two dimensions, one as a view of rows may have it, and one by rows."""
    mesh = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, shape in TRAINED.items()}
    strided = (_StridedShard(0, split_factor=2),)
    return {
        "in both": distribute_tensor(whole["in both"], square, [Shard(1), Shard(2)], src_data_rank=None),
        "strided": DTensor.from_local(whole["strided"].chunk(4)[dist.get_rank()], mesh, strided, run_check=False),
        "by rows": distribute_tensor(whole["by rows"], mesh, [Shard(0)], src_data_rank=None),
    }


def layouts(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in laid_out().items():
        parameter = nn.Parameter(tensor)
        parameter.grad = torch.ones_like(parameter)
        found[name] = said(Shampoo4([("layer.weight", parameter)], **OPTIONS).step)

    parameters = {name: nn.Parameter(tensor) for name, tensor in laid_out().items()}
    rows = parameters.pop("by rows")
    left = {"params": list(parameters.items()), "precondition": False}
    optimizer = Shampoo4([left, {"params": [("by rows", rows)]}], **OPTIONS)
    plain = [nn.Parameter(parameter.detach().clone()) for parameter in parameters.values()]
    adam = torch.optim.AdamW(plain, lr=OPTIONS["lr"], weight_decay=0.0)
    for step in range(4):
        for parameter, other in zip(parameters.values(), plain, strict=True):
            parameter.grad, other.grad = parameter.detach() + step, other.detach() + step
        rows.grad = rows.detach() + step
        optimizer.step()
        adam.step()
    found["as adam"] = all(
        torch.equal(one.to_local(), other.to_local()) for one, other in zip(parameters.values(), plain, strict=True)
    )
    found["checkpoint"] = said(lambda: checkpoint.save(optimizer, shared_folder()))
    return found


def test_what_cannot_be_preconditioned_can_be_left_to_the_base() -> None:
    for found in hosts.run_ranks(4, layouts):
        for name in ("in both", "strided"):
            assert "layer.weight of shape" in found[name], found[name]
            assert "leave it to the base optimizer" in found[name] and "precondition=False" in found[name]
        assert "(Shard(dim=1), Shard(dim=2))" in found["in both"] and "_StridedShard" in found["strided"]
        assert found["by rows"] == "nothing was raised"
        assert found["as adam"]
        assert "in both of shape (4, 4, 6)" in found["checkpoint"] and "a portable checkpoint" in found["checkpoint"]


def on_two_meshes(rank: int) -> tuple[str, str]:
    """Return the errors for dense weights beside experts on half of the ranks, and on a crossing mesh."""
    whole = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))

    def step(dense: DeviceMesh) -> None:
        parameters = [
            (name, nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)], src_data_rank=None)))
            for name, mesh in (("dense.weight", dense), ("experts.weight", square["expert"]))
        ]
        for (_, parameter), factor in zip(parameters, (1, 1 + rank // 2), strict=True):
            parameter.grad = torch.ones_like(parameter) * factor
        Shampoo4(parameters, **OPTIONS).step()

    return said(lambda: step(whole)), said(lambda: step(square["data"]))


def test_experts_are_no_copies_and_crossing_meshes_are_named_by_their_parameters() -> None:
    for experts, message in hosts.run_ranks(4, on_two_meshes):
        assert "ranks 0 and 2 hold the same elements of experts.weight, but their gradients differ" in experts
        assert "experts on parts of a mesh, which are no copies, to a Shampoo4 of their own" in experts
        assert message.startswith("ValueError: the parameters are on meshes of different ranks: DeviceMesh(")
        assert "(dense.weight, ...)" in message and "(experts.weight, ...)" in message
        assert "give the parameters of each mesh to a Shampoo4 of their own" in message


# -- DeepSpeed's experts -----------------------------------------------------------------------------------------------


def experts(rank: int) -> str:
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    zero.prepare()
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2))
    config = zero.configuration("zero1", optimizer={"type": "Shampoo4", "params": {}})
    engine = zero.start(model, config, groups=split({"params": list(model.parameters()), "name": "all"}))
    engine.backward(engine(torch.ones(4, 8))[0].sum())
    return said(engine.step)


def test_experts_of_deepspeed_are_refused_on_a_real_engine() -> None:
    for message in hosts.run_ranks(2, experts):
        assert "DeepSpeed runs with a mixture of experts (deepspeed.moe, expert parallelism)" in message
        assert "without deepspeed.moe.layer.MoE" in message
