"""The harness and the locations, proved with an elementwise optimizer: every host trains the same, bit by bit."""

from __future__ import annotations

import doctest
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from sharded_shampoo4.hosts import Host
from sharded_shampoo4.integrations import fsdp
from sharded_shampoo4.placement import local_tensor, locate, process_group
from sharded_shampoo4.planning.shards import Shard as Held

# World size: variant: how many copies there are of every parameter.
VARIANTS = {
    2: {"ddp": 2, "fsdp1": 1, "fsdp2": 1, "hsdp": 1, "fsdp1 no_shard": 2, "hsdp 2x1": 2},
    3: {"ddp": 3, "fsdp1": 1, "fsdp2": 1, "hsdp": 1, "hsdp 3x1": 3},
    4: {"ddp": 4, "fsdp1": 1, "fsdp2": 1, "hsdp": 2, "fsdp1 hybrid": 2, "hsdp 1x4": 1},
}
# A DTensor's first operation of a kind and shape takes some 30 ms, so not every kind of model is tried everywhere.
KINDS = {2: hosts.KINDS, 3: ("mlp", "vit"), 4: ("vit", "tied")}


def kinds(size: int, variant: str) -> tuple[str, ...]:
    return KINDS[size] if variant in hosts.HOSTS else KINDS[size][:1]


CASES = [
    pytest.param(size, variant, kind, marks=() if size == 2 else pytest.mark.slow)
    for size in VARIANTS
    for variant in VARIANTS[size]
    for kind in kinds(size, variant)
]
STEPS = 3


class Recorder:
    """Stands for the optimizer to which bind gives the locations."""

    def __init__(self) -> None:
        self.host = Host()

    def use_host(self, host: Host) -> None:
        self.host = host


class Wrapper:
    """As Accelerate's optimizer: it has ours inside."""

    def __init__(self, optimizer: Recorder) -> None:
        self.optimizer = optimizer


# -- what runs in the ranks --------------------------------------------------------------------------------------------


def options_of(variant: str, size: int) -> dict[str, Any]:
    if variant == "fsdp1 no_shard":
        return {"sharding_strategy": ShardingStrategy.NO_SHARD}
    if variant == "fsdp1 hybrid":
        return {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": hosts.make_mesh(2, size // 2)}
    if " " in variant:
        rows, _, columns = variant.split()[1].partition("x")
        return {"mesh": hosts.make_mesh(int(rows), int(columns))}
    return {}


def replayed(kind: str, step: int) -> dict[str, Tensor | None]:
    """The gradients of one step; in the second, some parameters have none."""
    gradients = hosts.make_gradients(kind, seed=step)
    return {name: None if step == 1 and "norm" in name else gradient for name, gradient in gradients.items()}


def train(model: nn.Module, host: str, kind: str) -> dict[str, Any]:
    """Replayed gradients with AdamW, then one real step with SGD: the whole parameters after each."""
    parameters = hosts.named(model, host)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        hosts.set_gradients(model, host, replayed(kind, step))
        optimizer.step()
    after_replay = hosts.full_parameters(model, host)
    local = {name: local_tensor(parameter).detach().clone() for name, parameter in parameters.items()}
    optimizer.zero_grad()
    loss = hosts.train_step(model, hosts.make_batch(kind))
    same_objects = all(new is parameters[name] for name, new in hosts.named(model, host).items())
    gradients = {name: None if p.grad is None else local_tensor(p.grad).shape for name, p in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    return {
        "replayed": after_replay,
        "local": local,
        "real": hosts.full_parameters(model, host),
        "loss": loss,
        "same_objects": same_objects,
        "gradients": gradients,
    }


def host_cases(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every variant and kind of model at this world size."""
    size = dist.get_world_size()
    results = {}
    for variant in VARIANTS[size]:
        options = options_of(variant, size)
        host = variant.split()[0]
        for kind in kinds(size, variant):
            model = hosts.wrap(hosts.make_model(kind), host, **options)
            recorder = Recorder()
            if host == "fsdp1":
                fsdp.bind(Wrapper(recorder), model)
            parameters = hosts.named(model, host)
            located = {name: recorder.host.locate(name, p, p)[0] for name, p in parameters.items()}
            group = process_group(parameters.values())
            shapes = {name: recorder.host.shape(p) for name, p in parameters.items()}
            results[variant, kind] = {"located": located, "shapes": shapes, "ranks": dist.get_world_size(group)}
            results[variant, kind].update(train(model, host, kind))
            again = {name: recorder.host.locate(name, p, p)[0] for name, p in parameters.items()}
            assert again == located
    return results


def placed(shape: tuple[int, ...], mesh_shape: tuple[int, ...], *placements: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", mesh_shape)
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def refusal(function: Callable[..., object], *args: object) -> str:
    try:
        function(*args)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(rank: int) -> dict[str, str]:
    """What is said of layouts that are not understood, at two ranks."""
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.zeros(4, 6), mesh, [Partial()], run_check=False)
    strided = DTensor.from_local(torch.zeros(2, 6), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    wrapped = hosts.wrap(hosts.make_model("mlp"), "fsdp1")
    flat = hosts.wrap(hosts.make_model("mlp"), "fsdp1", use_orig_params=False)
    transposed = hosts.make_model("mlp")
    transposed.head.weight = nn.Parameter(torch.zeros(101, 10).mT)
    moved = Recorder()
    fsdp.bind(moved, wrapped)
    held = next(iter(hosts.named(wrapped, "fsdp1").values()))
    elsewhere = fsdp.FSDP1Host({held: fsdp.Place(torch.Size((44, 20)), Held(0, 3))})
    unbound = fsdp.FSDP1Host({})
    alone = FullyShardedDataParallel(
        hosts.make_model("mlp"),
        process_group=dist.new_subgroups(1)[0],
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    return {
        "partial": refusal(locate, "w", partial),
        "strided": refusal(locate, "w", strided),
        "unbound": refusal(unbound.locate, "w", held, held),
        "moved": refusal(elsewhere.locate, "w", held, held),
        "flat": refusal(unbound.locate, "w", next(flat.parameters()), next(flat.parameters())),
        "bind flat": refusal(fsdp.bind, Recorder(), flat),
        "bind plain": refusal(fsdp.bind, Recorder(), hosts.make_model("mlp")),
        "bind order": refusal(fsdp.bind, Recorder(), hosts.wrap(transposed, "fsdp1")),
        "bind ranks": refusal(fsdp.bind, Recorder(), alone),
        "bind what": refusal(fsdp.bind, torch.optim.SGD(wrapped.parameters()), wrapped),
    }


def meshes(rank: int) -> dict[str, Any]:
    """Meshes of two and three dimensions at four ranks."""
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("outer", "one", "inner"))
    plane = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "shard", "one"))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    inner = fully_shard(hosts.make_model("mlp"), mesh=cube["inner"])
    world = hosts.wrap(hosts.make_model("mlp"), "fsdp2")
    half = hosts.wrap(hosts.make_model("mlp"), "hsdp", mesh=cube["one", "inner"])
    tensor_parallel = hosts.make_model("mlp")
    weight = distribute_tensor(tensor_parallel.head.weight.detach(), square["tensor"], [Shard(0)], src_data_rank=None)
    tensor_parallel.head.weight = nn.Parameter(weight)
    fully_shard(tensor_parallel.head, mesh=square["data"])

    def group_size(*modules: nn.Module) -> int:
        group = process_group(p for module in modules for p in module.parameters())
        return 1 if group is None else dist.get_world_size(group)

    def interval(parameter: DTensor) -> tuple[Held, Tensor]:
        return locate("w", parameter), parameter.to_local()

    two = {"replicate": plane["replicate"], "shard": plane["shard"]}
    return {
        "inner": group_size(inner),
        "half": group_size(half),
        "world": group_size(world, hosts.wrap(hosts.make_model("mlp"), "hsdp")),
        "plain": group_size(hosts.make_model("mlp")),
        "mixed": group_size(inner, world),
        "crossed": refusal(group_size, inner, fully_shard(hosts.make_model("mlp"), mesh=cube["outer"])),
        "both": group_size(fully_shard(hosts.make_model("mlp"), mesh=two["shard"])),
        "tensor parallel": locate("w", tensor_parallel.head.weight),
        "three": refusal(locate, "w", placed((2, 4, 6), (2, 2), Shard(1), Shard(2))),
        "rows": interval(placed((7, 3), (2, 2), Shard(0), Shard(0))),
        "long": interval(placed((1, 7, 3), (4,), Shard(1))),
        "copies": interval(placed((5, 3), (2, 2), Shard(0), Replicate())),
    }


def fail(rank: int) -> None:
    if rank == 1:
        raise ArithmeticError("the rank's own words")
    dist.barrier()


def sleep(rank: int) -> None:
    time.sleep(600)


# -- what is said of it ------------------------------------------------------------------------------------------------


@functools.cache
def results(size: int) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return hosts.run_ranks(size, host_cases)


@functools.cache
def reference(kind: str) -> dict[str, Any]:
    """The same training in one process, with one thread as in the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(hosts.make_model(kind), "none", kind)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("size", "variant", "kind"), CASES)
def test_replayed_gradients_train_the_same_parameters_bit_by_bit(size: int, variant: str, kind: str) -> None:
    expected = reference(kind)["replayed"]
    for rank in results(size):
        found = rank[variant, kind]["replayed"]
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "variant", "kind"), CASES)
def test_real_gradients_train_the_same_parameters(size: int, variant: str, kind: str) -> None:
    tolerance = {"rtol": 0.02, "atol": 0.01} if kind == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for rank in results(size):
        torch.testing.assert_close(rank[variant, kind]["real"], reference(kind)["real"], **tolerance)


@pytest.mark.parametrize(("size", "variant", "kind"), CASES)
def test_the_intervals_of_every_replica_tile_every_parameter(size: int, variant: str, kind: str) -> None:
    ranks = [rank[variant, kind] for rank in results(size)]
    for name, parameter in hosts.make_model(kind).named_parameters():
        replicas: dict[int, list[tuple[int, int]]] = {}
        for rank in ranks:
            location = rank["located"][name]
            assert rank["shapes"][name] == parameter.shape
            start, stop = location.start, location.stop
            assert (location.repeats, location.stride) == (1, 0)
            assert torch.equal(rank["local"][name].flatten(), rank["replayed"][name].flatten()[start:stop])
            replicas.setdefault(location.replica, [])
            if stop > start:
                replicas[location.replica].append((start, stop))
            else:
                assert (start, stop) == (0, 0)
        assert len(replicas) == VARIANTS[size][variant]
        for intervals in replicas.values():
            starts, stops = zip(*sorted(intervals), strict=True)
            assert (*starts, parameter.numel()) == (0, *stops)


def test_the_models_have_uneven_empty_and_partial_shards() -> None:
    uneven = [rank["fsdp2", "mlp"]["located"]["head.weight"] for rank in results(3)]
    assert [(x.start, x.stop) for x in uneven] == [(0, 4 * 101), (4 * 101, 8 * 101), (8 * 101, 10 * 101)]
    empty = [rank["fsdp2", "vit"]["located"]["position"] for rank in results(2)]
    assert [(x.start, x.stop) for x in empty] == [(0, 220), (0, 0)]
    partial = [rank["fsdp1", "mlp"]["located"]["head.weight"] for rank in results(3)]
    assert any(x.start % 101 for x in partial) and any(x.stop == 0 for x in partial)


@pytest.mark.parametrize(("size", "variant", "kind"), CASES)
def test_what_hosts_do_to_parameters_and_gradients(size: int, variant: str, kind: str) -> None:
    """Facts that an optimizer may rely on, or must not forget."""
    for rank in (rank[variant, kind] for rank in results(size)):
        assert rank["same_objects"]  # parameters keep their identity through a forward and backward pass
        assert rank["ranks"] == size
        for name, gradient in rank["gradients"].items():
            local = rank["local"][name]
            assert gradient is None or gradient == local.shape
            if variant in ("fsdp1", "fsdp1 hybrid") and not local.numel():
                assert gradient is None  # FSDP1: an empty shard has none, though other ranks' shards have
            if name == "unused.weight":  # FSDP1 makes zeros of a gradient that is None under the others
                assert (gradient is not None) == (variant.startswith("fsdp1") and local.numel() > 0)


def test_layouts_that_are_not_understood_are_refused() -> None:
    first, second = hosts.run_ranks(2, refusals)
    for said in (first, second):
        for case in ("partial", "strided"):
            assert said[case].startswith("ValueError: w of shape (4, 6) has placements ("), said[case]
            assert "Mesh(" in said[case] and "only Shard and Replicate are understood" in said[case]
        assert "Partial" in said["partial"] and "_StridedShard" in said["strided"]
        assert said["unbound"].startswith("ValueError: w is sharded by FSDP1")
        assert "call sharded_shampoo4.integrations.fsdp.bind(optimizer, model)" in said["unbound"]
        assert "w has " in said["moved"] and "elements 0 to 3 of (44, 20)" in said["moved"]
        assert said["flat"].startswith("ValueError: w is a flat parameter") and "use_orig_params=True" in said["flat"]
        assert "use_orig_params=False" in said["bind flat"]
        assert "no FullyShardedDataParallel (FSDP1) module" in said["bind plain"]
        assert "head.weight of shape (10, 101) has strides (1, 10)" in said["bind order"]
        assert "among 1 of 2 ranks" in said["bind ranks"]
        assert said["bind what"].startswith("TypeError: bind needs a Shampoo4 optimizer, not SGD")


def test_meshes_of_several_dimensions() -> None:
    ranks = hosts.run_ranks(4, meshes)
    for said in ranks:
        assert (said["inner"], said["half"], said["both"]) == (2, 2, 2)
        assert (said["world"], said["plain"], said["mixed"]) == (4, 4, 4)
        assert said["crossed"].startswith("ValueError: the parameters are on meshes of different ranks: DeviceMesh(")
        assert "placements (Shard(dim=1), Shard(dim=2))" in said["three"]
        assert "no more than two dimensions are cut, the first and another one" in said["three"]
    rows = [(said["tensor parallel"].start // 101, said["tensor parallel"].stop // 101) for said in ranks]
    assert rows == [(0, 3), (5, 8), (3, 5), (8, 10)]  # tensor parallelism cuts first
    for case, numel, copies in (("rows", 21, 1), ("long", 21, 1), ("copies", 15, 2)):
        held: dict[int, list[float]] = {}
        for said in ranks:
            location, local = said[case]
            assert local.flatten().tolist() == list(range(location.start, location.stop))
            held.setdefault(location.replica, []).extend(local.flatten().tolist())
        assert len(held) == copies
        assert all(sorted(elements) == list(range(numel)) for elements in held.values())


def test_one_process_holds_everything() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert locate("w", parameter) == Held(0, 12)
    assert locate("w", nn.Parameter(torch.zeros(0, 4))) == Held(0, 0)
    assert local_tensor(parameter) is parameter
    assert process_group([parameter]) is None
    assert doctest.testmod(fsdp).failed == 0


def test_a_failing_rank_speaks_in_the_parent() -> None:
    with pytest.raises(hosts.RankError, match=r"rank 1 of 2 failed first(?s:.*)ArithmeticError: the rank's own words"):
        hosts.run_ranks(2, fail)


@pytest.mark.slow
def test_ranks_that_do_not_end_are_killed() -> None:
    with pytest.raises(hosts.RankError, match=r"2 ranks did not end in 4 s"):
        hosts.run_ranks(2, sleep, timeout=4.0)
