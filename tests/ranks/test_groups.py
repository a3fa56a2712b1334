"""Which ranks share a model: some of them, each its own, and those of other optimizers and frameworks."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import SMALL_BLOCKS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.integrations import fsdp

OPTIONS = SMALL_BLOCKS
STEPS = range(9)
KINDS = ("mlp", "tied")  # of models on two halves of the ranks


def make(model: nn.Module, host: str = "none", **options: Any) -> Shampoo4:
    return Shampoo4(hosts.named(model, host).items(), **{**OPTIONS, **options})


def with_buffer(value: float, seed: int = 0) -> nn.Module:
    model = hosts.make_model("mlp", seed)
    model.register_buffer("seen", torch.tensor([value]))
    return model


def advance(model: nn.Module, host: str, optimizer: Any, steps: range, seed: int = 0, kind: str = "mlp") -> None:
    for step in steps:
        hosts.set_gradients(model, host, hosts.make_gradients(kind, 100 * seed + step))
        optimizer.step()


@functools.cache
def one_process(seed: int = 0, kind: str = "mlp", steps: range = STEPS) -> dict[str, Tensor]:
    with hosts.one_thread():
        model = hosts.make_model(kind)
        advance(model, "none", make(model), steps, seed, kind)
        return hosts.full_parameters(model, "none")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def shared_folder(rank: int) -> Path:
    found = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(found)
    return Path(found[0])


# -- some of the ranks -------------------------------------------------------------------------------------------------


def some_ranks(rank: int) -> dict[str, Any]:
    """Of three ranks, two train a model under a host; the first one is in a group more than the others are."""
    dist.new_group([0])
    group = dist.new_group([1, 2])
    folder = shared_folder(rank)
    told: dict[str, Any] = {"chosen": hosts.said(lambda: Shampoo4([torch.zeros(3, 3)], process_group=group))}
    for host in ("ddp", "fsdp1", "fsdp2") if rank else ():
        if host == "fsdp2":
            mesh = DeviceMesh.from_group(group, "cpu")
            model = fully_shard(with_buffer(7.0), mesh=mesh)
        else:
            model = hosts.wrap(with_buffer(7.0), host, process_group=group)
        optimizer = make(model, host, process_group=group)
        if host == "fsdp1":
            fsdp.bind(optimizer, model)
        advance(model, host, optimizer, range(5))
        checkpoint.save(optimizer, folder / host, model=model)
        told[host, "health"] = sorted(optimizer.health())
        advance(model, host, optimizer, range(5, 9))
        told[host] = hosts.full_parameters(model, host)
        checkpoint.load(optimizer, folder / host, model=model)
        advance(model, host, optimizer, range(5, 9))
        told[host, "loaded"] = hosts.full_parameters(model, host)
        if host == "ddp":
            told["copied"] = hosts.said(lambda: copy.deepcopy(make(model, process_group=group)))  # noqa: B023
            told["unconsolidated"] = hosts.said(optimizer.state_dict)
            optimizer.consolidate_state_dict()
            told["states"] = len(optimizer.state_dict()["state"])
    dist.barrier()
    model = with_buffer(0.0)  # and then one that all of them train
    optimizer = make(model)
    checkpoint.load(optimizer, folder / "ddp", model=model)
    told["seen"] = model.seen.item()
    advance(model, "none", optimizer, range(5, 9))
    told["everyone"] = hosts.full_parameters(model, "none")
    return told


def test_some_of_the_ranks_train_as_one_process_does() -> None:
    first, *others = hosts.run_ranks(3, some_ranks)
    assert first["chosen"].startswith("ValueError: rank 0 is not in the group that process_group= was given")
    for told in others:
        for host in ("ddp", "fsdp1", "fsdp2"):
            assert_equal(told[host], one_process())
            assert_equal(told[host, "loaded"], one_process())
            assert told[host, "health"] == ["head.weight", "middle.weight", "stem.weight"]
        assert "has a process_group cannot be copied" in told["copied"]
        assert "consolidate_state_dict() on every rank" in told["unconsolidated"] and told["states"] == 8
    for told in (first, *others):
        assert told["seen"] == 7.0
        assert_equal(told["everyone"], one_process())


def overlapping(rank: int) -> list[dict[str, Tensor]]:
    """Two models on two groups; the rank in the middle trains both."""
    trained = []
    for seed, ranks in enumerate(([0, 1], [1, 2])):
        group = dist.new_group(ranks)
        if rank in ranks:
            model = hosts.make_model("mlp")
            advance(model, "none", make(model, process_group=group), STEPS, seed)
            trained.append(hosts.full_parameters(model, "none"))
    return trained


def test_two_models_on_groups_that_share_a_rank() -> None:
    first, both, second = hosts.run_ranks(3, overlapping)
    for found, seed in ((first[0], 0), (both[0], 0), (both[1], 1), (second[0], 1)):
        assert_equal(found, one_process(seed))


def halves(rank: int) -> dict[str, dict[str, Tensor]]:
    """Four ranks: two models on two halves, two stages of a pipeline, and experts beside what all ranks have."""
    half, group = rank // 2, dist.new_subgroups(2)[0]
    found = {}
    model = hosts.make_model("mlp")
    advance(model, "none", make(model, process_group=group), STEPS, half)
    found["two models"] = hosts.full_parameters(model, "none")

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))["data"]
    kind = KINDS[half]
    stage = hosts.wrap(hosts.make_model(kind), "fsdp2", mesh=mesh)  # other names and shapes than the other stage's
    advance(stage, "fsdp2", make(stage, "fsdp2"), STEPS, kind=kind)
    found["pipeline"] = hosts.full_parameters(stage, "fsdp2")

    dense, experts = hosts.make_model("mlp"), hosts.make_model(kind)
    ours, theirs = make(dense), make(experts, process_group=group)
    for step in STEPS:
        advance(dense, "none", ours, range(step, step + 1))
        if half or step % 2:  # the experts of the first half are asked in some of the steps only
            advance(experts, "none", theirs, range(step, step + 1), kind=kind)
    found["dense"], found["experts"] = hosts.full_parameters(dense, "none"), hosts.full_parameters(experts, "none")
    return found


def test_halves_of_the_ranks_train_something_of_their_own() -> None:
    ranks = hosts.run_ranks(4, halves)
    for rank, found in enumerate(ranks):
        half = rank // 2
        assert_equal(found["two models"], one_process(half))
        assert_equal(found["pipeline"], one_process(kind=KINDS[half]))
        assert_equal(found["dense"], one_process())
        assert_equal(found["experts"], one_process(kind=KINDS[half], steps=STEPS if half else STEPS[1::2]))


def hsdp_on_some(rank: int) -> tuple[str, list[dict[str, Tensor]]]:
    """HSDP on four of five ranks: there is a group of all of them only if it is given, or the mesh was flattened."""
    group = dist.new_group([1, 2, 3, 4])
    mesh = DeviceMesh("cpu", torch.tensor([[1, 2], [3, 4]]), mesh_dim_names=("replicate", "shard"))
    if rank == 0:
        mesh._flatten("both")
        return "", []

    def train(**options: Any) -> nn.Module:
        model = fully_shard(hosts.make_model("mlp"), mesh=mesh)
        advance(model, "fsdp2", make(model, "fsdp2", **options), STEPS)
        return model

    said, given = hosts.said(train), hosts.full_parameters(train(process_group=group), "fsdp2")
    mesh._flatten("both")
    return said, [given, hosts.full_parameters(train(), "fsdp2")]


@pytest.mark.slow
def test_hsdp_on_some_of_the_ranks() -> None:
    for said, found in hosts.run_ranks(5, hsdp_on_some)[1:]:
        assert "has only some of the 5 ranks, and more than one dimension: give process_group=" in said
        for parameters in found:
            assert_equal(parameters, one_process())


# -- each by itself ----------------------------------------------------------------------------------------------------


def alone(rank: int) -> dict[str, Any]:
    """Every rank trains a model of its own, with its own gradients and another number of steps."""
    folder, shared = Path(tempfile.mkdtemp()), shared_folder(rank)
    model = with_buffer(7.0)
    optimizer = make(model, process_group="alone")
    advance(model, "none", optimizer, range(5), rank)
    checkpoint.save(optimizer, folder, model=model)
    optimizer.consolidate_state_dict()
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    twin, twins = pickle.loads(pickle.dumps((model, optimizer)))
    if rank:
        optimizer.health()
        optimizer.describe()
    for other, its in ((model, optimizer), (twin, twins)):
        advance(other, "none", its, range(5, 9), rank)
    resumed = with_buffer(0.0, seed=1)
    other = make(resumed, process_group="alone")
    checkpoint.load(other, folder, model=resumed)
    advance(resumed, "none", other, range(5, 9), rank)
    options = optimizer.state_dict()["param_groups"][0]
    return {
        "trained": hosts.full_parameters(model, "none"),
        "copied": hosts.full_parameters(twin, "none"),
        "resumed": hosts.full_parameters(resumed, "none"),
        "seen": resumed.seen.item(),
        "shared": hosts.said(lambda: checkpoint.save(optimizer, shared, model=model)),
        "stored": [key for key in options if "process" in key],
        "only one steps": hosts.said(lambda: rank or advance(model, "none", optimizer, range(3))),
    }


def test_ranks_that_train_models_of_their_own() -> None:
    ranks = hosts.run_ranks(2, alone)
    assert sum("give each of them a directory of its own" in told["shared"] for told in ranks) >= 1
    assert all(told["shared"] == "nothing was raised" or "a checkpoint that rank" in told["shared"] for told in ranks)
    for rank, told in enumerate(ranks):
        for what in ("trained", "copied", "resumed"):
            assert_equal(told[what], one_process(rank))
        assert told["seen"] == 7.0 and not told["stored"] and told["only one steps"] == "nothing was raised"


def local_sgd(rank: int) -> dict[str, Any]:
    """Every rank makes steps with gradients of its own, and parameters are averaged now and then."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    def train(**options: Any) -> nn.Module:
        model = hosts.make_model("mlp")
        optimizer, averager = make(model, **options), PeriodicModelAverager(period=3, warmup_steps=0)
        for step in STEPS:
            hosts.set_gradients(model, "none", hosts.make_gradients("mlp", 100 * rank + step))
            optimizer.step()
            averager.average_parameters(model.parameters())
        return model

    return {"together": hosts.said(train), "alone": hosts.full_parameters(train(process_group="alone"), "none")}


def averaged() -> list[dict[str, Tensor]]:
    """The same in one process, with one model for each rank."""
    with hosts.one_thread():
        models = [hosts.make_model("mlp") for _ in range(2)]
        optimizers = [make(model) for model in models]
        for step in STEPS:
            for seed, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                advance(model, "none", optimizer, range(step, step + 1), seed)
            if step % 3 == 0:
                with torch.no_grad():
                    for pair in zip(*(model.parameters() for model in models), strict=True):
                        mean = (pair[0] / 2) + (pair[1] / 2)
                        for parameter in pair:
                            parameter.copy_(mean)
        return [hosts.full_parameters(model, "none") for model in models]


def test_local_sgd() -> None:
    for told, expected in zip(hosts.run_ranks(2, local_sgd), averaged(), strict=True):
        torch.testing.assert_close(told["alone"], expected, rtol=1e-6, atol=1e-7)
        assert "wrap the model in DistributedDataParallel or FSDP" in told["together"]
        assert "process_group='alone'" in told["together"] and "local SGD" in told["together"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(rank: int) -> dict[str, str]:
    own = dist.new_subgroups(1)[0]
    sharded, flat = hosts.wrap(hosts.make_model("mlp"), "fsdp2"), hosts.wrap(hosts.make_model("mlp"), "fsdp1")
    single = FullyShardedDataParallel(
        hosts.make_model("mlp"), process_group=own, use_orig_params=True, device_id=torch.device("cpu")
    )

    def step(model: nn.Module, host: str, **options: Any) -> None:
        optimizer = make(model, host, **options)
        if host == "fsdp1":
            fsdp.bind(optimizer, model)
        advance(model, host, optimizer, range(1))

    def own_models(**options: Any) -> None:
        model = nn.Sequential(nn.Linear(8, 4 + rank))
        optimizer = Shampoo4(model.named_parameters(), **options)
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()

    def other_type() -> None:
        model = hosts.make_model("mlp").to((torch.float32, torch.float64)[rank])
        optimizer = make(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def other_names() -> None:
        parameter = nn.Parameter(torch.ones(8, 8))
        parameter.grad = torch.ones(8, 8)
        Shampoo4([(f"rank{rank}", parameter)]).step()

    return {
        "alone, FSDP2": hosts.said(lambda: step(sharded, "fsdp2", process_group="alone")),
        "group, FSDP2": hosts.said(lambda: step(sharded, "fsdp2", process_group=own)),
        "alone, FSDP1": hosts.said(lambda: step(flat, "fsdp1", process_group="alone")),
        "none, FSDP1 by itself": hosts.said(lambda: step(single, "fsdp1")),
        "alone, FSDP1 by itself": hosts.said(lambda: step(single, "fsdp1", process_group="alone")),
        "own models": hosts.said(own_models),
        "own models, alone": hosts.said(lambda: own_models(process_group="alone")),
        "own models, own groups": hosts.said(lambda: own_models(process_group=own)),
        "other names": hosts.said(other_names),
        "other type": hosts.said(other_type),
    }


def test_refusals_name_the_option_and_the_way_out() -> None:
    for told in hosts.run_ranks(2, refused):
        assert told["alone, FSDP2"] == (
            "ValueError: process_group='alone', but stem.weight is sharded over ranks [0, 1]: leave process_group out, "
            "the ranks of a mesh are found by themselves"
        )
        assert "but stem.weight is on a mesh of ranks [0, 1]: leave process_group out" in told["group, FSDP2"]
        assert "process_group='alone', but FSDP1 shards a module among 2 ranks" in told["alone, FSDP1"]
        assert "among 1 of 2 ranks: it must be all, or those of" in told["none, FSDP1 by itself"]
        assert told["alone, FSDP1 by itself"] == "nothing was raised"
        assert "0.weight has shape (4, 8) on rank 0 and (5, 8) on rank 1" in told["own models"]
        assert "ranks precondition different parameters: rank 0 1 (rank0)" in told["other names"]
        assert "dtype of stem.weight is 'torch.float32' on rank 0 and 'torch.float64' on rank 1" in told["other type"]
        for case in ("own models", "other names"):
            assert "process_group='alone'" in told[case] and "process_group= takes their group" in told[case]
            assert "functools.partial(Shampoo4, process_group='alone')" in told[case]
        assert told["own models, alone"] == told["own models, own groups"] == "nothing was raised"


def by_deepspeed(rank: int) -> dict[str, str]:
    zero.prepare()
    told = {}
    for host in ("zero0", "zero2", "zero3"):
        for chosen in ("alone", dist.group.WORLD):
            model = hosts.make_model("mlp")
            engine = zero.start(zero.Replay(model), zero.configuration(host), make(model, process_group=chosen))
            told[f"{host} {chosen == 'alone'}"] = hosts.said(lambda: zero.step(engine, hosts.make_gradients("mlp", 0)))  # noqa: B023
            engine.destroy()
    return told


def test_deepspeed_shares_parameters_among_all_ranks() -> None:
    for told in hosts.run_ranks(2, by_deepspeed):
        for case, said in told.items():
            assert "but DeepSpeed shares " in said and "among all ranks: leave process_group out" in said, (case, said)


# -- torch's ZeroRedundancyOptimizer -----------------------------------------------------------------------------------


def zero_redundancy(rank: int) -> dict[str, Any]:
    def train(optimizer_class: Any, **options: Any) -> nn.Module:
        model = hosts.make_model("mlp")
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class, **options, **OPTIONS)
        advance(model, "none", optimizer, STEPS)
        return model

    spread = train(functools.partial(Shampoo4, process_group="alone"))
    return {
        "plain": hosts.said(lambda: train(Shampoo4)),
        "its own group": hosts.said(lambda: train(Shampoo4, process_group=dist.group.WORLD)),
        "alone": hosts.full_parameters(spread, "none"),
    }


def test_zero_redundancy_optimizer() -> None:
    for told in hosts.run_ranks(2, zero_redundancy):
        for case in ("plain", "its own group"):
            assert "functools.partial(Shampoo4, process_group='alone')" in told[case], told[case]
        assert_equal(told["alone"], one_process())


# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("world", "process_group must be None, 'alone' or a torch.distributed ProcessGroup, got 'world'"),
        ([0, 1], "process_group must be None, 'alone' or a torch.distributed ProcessGroup, not list"),
    ],
)
def test_values_that_make_no_sense(value: Any, message: str) -> None:
    assert message in hosts.said(lambda: Shampoo4([nn.Parameter(torch.zeros(2, 2))], process_group=value))


def test_the_option_belongs_to_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(8, 8))
    group = {"params": [parameter], "process_group": "alone"}
    assert "process_group belongs to the whole optimizer" in hosts.said(lambda: Shampoo4([group]))
    optimizer = Shampoo4([parameter], process_group="alone")
    assert "process_group" not in optimizer.param_groups[0] and "process_group" not in optimizer.defaults
    parameter.grad = torch.ones(8, 8)
    optimizer.step()
    assert copy.deepcopy(optimizer)._process_group == "alone"


# -- agreements --------------------------------------------------------------------------------------------------------


def agreed(rank: int) -> dict[str, Any]:
    """What all ranks hear if one of them says it, each in turn, and bytes of every rank."""
    ranks = Ranks(dist.group.WORLD)
    flags = [ranks.any([rank == one, False]) for one in range(ranks.size)]
    many = [ranks.any([rank == one and place == 9 for place in range(12)]) for one in range(ranks.size)]
    gathered = ranks.gather_bytes(torch.full((rank,), rank, dtype=torch.uint8), list(range(ranks.size)))
    return {"flags": flags, "many": many, "gathered": [part.tolist() for part in gathered]}


def test_every_rank_hears_what_one_says() -> None:
    """Five ranks: as many as are no power of two."""
    for found in hosts.run_ranks(5, agreed):
        assert found["flags"] == [(True, False)] * 5
        assert found["many"] == [tuple(place == 9 for place in range(12))] * 5
        assert found["gathered"] == [[rank] * rank for rank in range(5)]
