"""Shards that are offloaded to the host are preconditioned on the accelerator, for which the meta device stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.meta_steps import FakeRanks, count_step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sharded_shampoo4 import Shampoo4, placement
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.integrations import fsdp
from sharded_shampoo4.placement import compute_device
from sharded_shampoo4.planning.shards import Shard as Held

SHAPES = {"wide": (64, 64), "narrow": (32, 16)}
META = torch.device("meta")


def offloaded(ranks: FakeRanks) -> dict[str, nn.Parameter]:
    """This rank's shards as FSDP2's CPUOffloadPolicy leaves them: on the host, of an accelerator's mesh."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = DeviceMesh("cuda", torch.arange(ranks.size), _init_backend=False)
    parameters = {}
    for name, shape in SHAPES.items():
        whole = torch.empty(shape, device=META)
        start, stop = ranks.shards[name][ranks.rank][:2]
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(whole.shape, whole.stride(), whole.dtype))
        local = torch.zeros((stop - start) // shape[1], shape[1])
        parameters[name] = nn.Parameter(DTensor(local, spec, requires_grad=False))
    return parameters


def test_fsdp2_with_cpu_offload_computes_on_the_accelerator_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(placement, "_current_device", lambda kind: asked.append(kind) or META)
    with FakeRanks(1, 4, SHAPES) as ranks:
        parameters = offloaded(ranks)
        assert all(parameter.device.type == "cpu" for parameter in parameters.values())
        optimizer = Shampoo4(parameters.items(), method="shampoo", statistics_interval=2, root_interval=4)
        for step in range(6):  # before the roots, with statistics, with roots, and an ordinary one
            count_step(optimizer, parameters.values(), answer=int(step == 0))
        binding = optimizer._session.last
        assert binding is not None and set(asked) == {"cuda"}
        assert set(binding.exchange.devices) == {pool.device for pool in binding.preconditioner.pools} == {META}
        assert optimizer.traffic_bytes() > 0 and binding.ranks.tried == {META}
        for parameter in parameters.values():
            assert parameter.grad is not None and parameter.grad.device.type == "cpu"
            states = [state for state in optimizer.state[parameter].values() if isinstance(state, Tensor)]
            assert states and all(state.device.type == "cpu" for state in states)


def test_what_is_not_offloaded_stays_where_it_is() -> None:
    with FakeRanks(1, 4, SHAPES) as ranks:
        for parameter in ranks.parameters().values():  # on the meta device, of a mesh of the host
            assert compute_device(parameter) == META
    assert compute_device(torch.zeros(2)) == torch.device("cpu")


def test_fsdp1_with_cpu_offload_computes_where_fsdp1_does() -> None:
    info = SimpleNamespace(in_shard=True, intra_param_start_idx=0, intra_param_end_idx=29)
    flat = SimpleNamespace(
        device=torch.device("cpu"),
        _params=[nn.Parameter(torch.zeros(30))],
        _fqns=["w"],
        _shapes=[(6, 10)],
        _strides=[(10, 1)],
        _param_extensions=[None],
        _shard_param_infos=[info],
    )
    unit = SimpleNamespace(
        compute_device=META,
        process_group=SimpleNamespace(size=lambda: 4),
        _handle=SimpleNamespace(flat_param=flat, uses_sharded_strategy=True),
    )
    with FakeRanks(1, 4, SHAPES):
        ((parameter, location),) = fsdp._unit_places(unit, None)
        assert location == fsdp.Place(torch.Size((6, 10)), Held(0, 30), META)
        optimizer = Shampoo4([("w", parameter)])
        optimizer.use_host(fsdp.FSDP1Host({parameter: location}))
        (entry,) = optimizer._members.entries(optimizer.param_groups)
        matrix = entry.matrix({})
        assert matrix is not None and matrix.device == META and entry.holder.device.type == "cpu"


def test_an_accelerator_without_a_backend_is_named() -> None:
    with FakeRanks(1, 4, SHAPES):
        ranks = Ranks(torch.distributed.group.WORLD)
        for device in ("cpu", "meta", "cuda"):
            ranks.check_device("w", torch.device(device))
        with pytest.raises(
            ValueError, match=r"w is preconditioned on xpu.*init_process_group\(\"cpu:gloo,cuda:nccl\"\)"
        ):
            ranks.check_device("w", torch.device("xpu"))


def test_stored_factors_on_the_host_travel_from_the_accelerator() -> None:
    """As a state_dict with ``cpu_offload=True`` brings them: the group of the mesh may serve the accelerator only."""
    from sharded_shampoo4.numerics.matrix import Matrix
    from sharded_shampoo4.options import PreconditionerOptions
    from sharded_shampoo4.packing import PackedState

    calls: list[Any] = []

    class Sharded:
        def to(self, device: torch.device) -> Sharded:
            calls.append(device)
            return self

        def full_tensor(self) -> Tensor:
            return torch.zeros(3)

    state = PackedState(PreconditionerOptions(), Sharded())  # type: ignore[arg-type]
    matrix = Matrix("w", (6, 10), PreconditionerOptions(), META)
    assert torch.equal(state.full(matrix, Ranks(None)), torch.zeros(3)) and calls == [META]
