"""Steps of an optimizer on the meta device, counted: in one process, or on one rank of several that are not there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.comm import groups
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.memory import shard_all
from sharded_shampoo4.planning.shards import Shard

from .kernels import Counts, CountWork
from .vit import BASE, vit_shapes

Shapes = Mapping[str, tuple[int, ...]]


# Of method="shampoo"
LAYOUTS: dict[str, dict[str, Any]] = {"default": {"method": "shampoo"}, "compact": {"preset": "shampoo-compact"}}
VIT_B = vit_shapes(*BASE)
RANK = 3  # of those that are simulated: one in the middle

_BACKEND = "fake_gloo"  # by this name it serves the host as well: no second group is made beside it


class FakeRanks(contextlib.AbstractContextManager["FakeRanks"]):
    """This process as ``rank`` of ``size`` under FSDP2. The other ranks are not there.

    Collectives on tensors do nothing (torch's fake process group). Objects that are gathered are this rank's own, with
    the other ranks' shards in place of its shards: ranks differ in nothing else. This is all that is made up.
    """

    def __init__(self, rank: int, size: int, shapes: Shapes, device: str = "meta") -> None:
        self.rank, self.size, self.shapes, self.device = rank, size, shapes, device
        sharding = shard_all("fsdp2", [torch.Size(shape) for shape in shapes.values()], size, 1)
        self.shards = dict(zip(shapes, sharding.shards, strict=True))
        self._gather, self._host_group = Ranks.gather, groups.host_group

    def __enter__(self) -> FakeRanks:
        import torch.distributed._tools.fake_collectives  # noqa: F401  torch 2.9 and 2.10 let only it take meta tensors
        from torch.testing._internal.distributed.fake_pg import _create_fake_pg

        if not hasattr(dist.Backend, _BACKEND.upper()):
            dist.Backend.register_backend(_BACKEND, _create_fake_pg, extended_api=True, devices=["cpu", "cuda"])
        dist.init_process_group(_BACKEND, rank=self.rank, world_size=self.size, store=dist.HashStore())
        groups.host_group = lambda group: group
        Ranks.gather = lambda _, value: [self._of_rank(rank, value) for rank in range(self.size)]
        return self

    def __exit__(self, *error: Any) -> None:
        Ranks.gather, groups.host_group = self._gather, self._host_group
        dist.destroy_process_group()

    def _of_rank(self, rank: int, value: Any, name: str = "") -> Any:
        """``value`` with a rank's shards. The name of a parameter stands before its shard, in the same tuple."""
        if isinstance(value, Shard):
            return self.shards[name][rank]
        if type(value) in (list, tuple):
            name = next((part for part in value if isinstance(part, str) and part in self.shards), name)
            return type(value)(self._of_rank(rank, part, name) for part in value)
        return value

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's part of every parameter, as ``fully_shard`` makes them."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Sharded

        mesh = init_device_mesh("cpu", (self.size,))
        parameters = {}
        for name, shape in self.shapes.items():
            whole = torch.empty(shape, device="meta")
            start, stop = self.shards[name][self.rank][:2]
            local = torch.zeros((stop - start) // whole[0].numel(), *shape[1:], device=self.device)
            layout = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
            parameters[name] = nn.Parameter(DTensor.from_local(local, mesh, [Sharded(0)], **layout))
        return parameters


@dataclass
class StepCounts:
    """What steps of four kinds ask for, and what the optimizer keeps.

    The statistics step comes before the first roots: it gives no directions. The one with roots gives some.
    """

    before_roots: Counts  # an ordinary step
    ordinary: Counts  # after the first roots
    statistics: Counts
    roots: Counts  # and statistics
    state_bytes: dict[str, int]


@dataclass
class SoapCounts:
    """What steps of method="soap" ask for, and the bytes of its states."""

    ordinary: Counts
    refresh: Counts
    state_bytes: dict[str, int]


def count_steps(parameters: Mapping[str, nn.Parameter], **options: Any) -> StepCounts:
    """Count the first steps of an optimizer. Its base works with ``foreach``, as it does on GPUs by default."""
    options = {"foreach": True, **options, "statistics_interval": 2, "root_interval": 4}
    optimizer = Shampoo4(parameters.items(), **options)
    count_step(optimizer, parameters.values(), answer=1)  # with 0 the gradients look like zeros
    statistics, before, roots, ordinary = (count_step(optimizer, parameters.values()) for _ in range(4))
    return StepCounts(before, ordinary, statistics, roots, optimizer.state_bytes())


def count_soap_steps(parameters: Mapping[str, nn.Parameter]) -> SoapCounts:
    """Count an ordinary step of method="soap" and one with refreshes, the third and the fourth."""
    optimizer = Shampoo4(parameters.items(), foreach=True, method="soap", statistics_interval=4, interval_warmup=False)
    count_step(optimizer, parameters.values(), answer=1)
    _, ordinary, refresh = (count_step(optimizer, parameters.values()) for _ in range(3))
    return SoapCounts(ordinary, refresh, optimizer.state_bytes())


def count_step(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], answer: int = 0) -> Counts:
    """Count one step in which every parameter has a gradient."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with CountWork(answer) as work:
        optimizer.step()
    return work.counts


def whole_parameters(shapes: Shapes) -> dict[str, nn.Parameter]:
    """The parameters of one process."""
    return {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}


@functools.cache
def count_soap_of_vit_b(world_size: int) -> SoapCounts:
    """Count steps of method="soap", as :func:`count_vit_b` does."""
    if world_size == 1:
        return count_soap_steps(whole_parameters(VIT_B))
    with FakeRanks(RANK, world_size, VIT_B) as ranks:
        return count_soap_steps(ranks.parameters())


@functools.cache
def count_vit_b(world_size: int, layout: str) -> StepCounts:
    """Count steps of ViT-B in one process, or on rank ``RANK`` under FSDP2, with the options of ``LAYOUTS``."""
    if world_size == 1:
        return count_steps(whole_parameters(VIT_B), **LAYOUTS[layout])
    with FakeRanks(RANK, world_size, VIT_B) as ranks:
        return count_steps(ranks.parameters(), **LAYOUTS[layout])
