"""More ranks: every rank keeps and sends exactly what was estimated, a fair share of it, in memory that stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support.marks import slow_except
from support.vit import BASE, LARGE, vit_shapes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sharded_shampoo4 import MemoryEstimate, Shampoo4, estimate_memory
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.distributor import Distributor
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.planning import plan
from sharded_shampoo4.planning.blocks import Cutting, cut_blocks
from sharded_shampoo4.planning.plan import Plan, PlannedMatrix
from sharded_shampoo4.planning.shards import Shard
from sharded_shampoo4.planning.views import matrix_view

Shapes = dict[str, tuple[int, ...]]

EVERY_STEP: dict[str, Any] = {
    "method": "shampoo",
    "statistics_interval": 2,
    "root_interval": 2,
}  # step 3 is the first ordinary one
OPTIONS: dict[str, dict[str, Any]] = {  # by kinds of models
    "mlp": {"min_quant_numel": 0},
    "vit": {"max_preconditioner_dim": 30, "split": "remainder", "refresh": "staggered"},
    "tied": {"max_preconditioner_dim": 17, "base": "adagrad", "exchange_dtype": "bfloat16"},
    "bf16": {"max_preconditioner_dim": 40, "base": "sgd", "momentum": 0.9},
    "vit, soap": {"method": "soap", "max_preconditioner_dim": 30, "momentum_dtype": "int8", "min_quant_numel": 0},
    "bf16, soap": {"method": "soap", "bits": 4, "base": "adagrad", "second_moment_dtype": "float32"},
}
SPREAD = ("ddp", "fsdp2", "hsdp")


# -- estimates are what ranks measure ----------------------------------------------------------------------------------


def model_of(kind: str) -> nn.Module:
    return hosts.make_model(kind.removesuffix(", soap"))


def options_of(kind: str) -> dict[str, Any]:
    every_step = {"statistics_interval": 2} if kind.endswith("soap") else EVERY_STEP
    return {**every_step, **OPTIONS[kind]}


def shapes_of(kind: str) -> Shapes:
    """Of the parameters that are trained."""
    return {name: tuple(p.shape) for name, p in model_of(kind).named_parameters() if p.requires_grad}


def estimated(kind: str, host: str, world_size: int) -> MemoryEstimate:
    replicas = {2: 1, 3: 1, 4: 2}[world_size] if host == "hsdp" else None  # as worlds.wrap makes its mesh
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
    layout = {"host": host, "replicas": replicas, "dtype": dtype}
    return estimate_memory(shapes_of(kind), world_size, **layout, **options_of(kind))


def train(model: nn.Module, host: str, optimizer: Shampoo4, steps: int) -> None:
    """Steps in which every trained parameter has a gradient, the same on every rank."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        gradients = {
            name: torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            for name, parameter in hosts.named(model, host).items()
            if parameter.requires_grad
        }
        hosts.set_gradients(model, host, gradients)
        optimizer.step()


def measure(host: str, kind: str) -> tuple[dict[str, int], int]:
    """State bytes of this rank, and the bytes that it sends in an ordinary step."""
    model = hosts.wrap(model_of(kind), host)
    optimizer = Shampoo4(hosts.named(model, host).items(), **options_of(kind))
    train(model, host, optimizer, 2)
    before = optimizer.traffic_bytes()
    train(model, host, optimizer, 1)
    return optimizer.state_bytes(), optimizer.traffic_bytes() - before


# -- memory in flight --------------------------------------------------------------------------------------------------

WIDTH = 32  # of square matrices, a block each
SMALL_BATCH = 2**14  # elements: four such blocks with their roots and directions


class MostAlive(TorchDispatchMode):
    """The most bytes alive at any moment, of all tensors that are made while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class Landed:
    """Stands for a collective that has been made already; its result arrives with ``wait()``."""

    def __init__(self, receive: Tensor, found: Tensor) -> None:
        self.receive, self.found = receive, found

    def wait(self) -> None:
        self.receive.copy_(self.found)


def on_copies(start: Callable[..., Any]) -> Callable[..., Landed]:
    """``start``, at once and on copies that are not counted: gloo lets go of its tensors some time after ``wait()``."""

    def started(ranks: Ranks, receive: Tensor, send: Tensor, *args: Any) -> Landed:
        with _disable_current_modes():
            found = torch.empty_like(receive)
            start(ranks, found, send.clone(), *args).wait()
        return Landed(receive, found)

    return started


def most_in_flight(host: str, depth: int, batch_elements: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most bytes alive while ordinary steps exchange and precondition, beyond gradients and states."""
    monkeypatch.setattr(plan, "BATCH_ELEMENTS_PER_MIB", batch_elements // 256)  # of 256 MiB
    model = hosts.wrap(nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)]), host)
    optimizer = Shampoo4(hosts.named(model, host).items(), **EVERY_STEP, min_quant_numel=0)
    train(model, host, optimizer, 4)
    alive = MostAlive()
    precondition = Distributor.precondition

    def watched(distributor: Distributor) -> None:
        with alive:
            precondition(distributor)

    with monkeypatch.context() as patch:
        patch.setattr(Distributor, "precondition", watched)
        for name in ("start_all_to_all", "start_all_gather"):
            patch.setattr(Ranks, name, on_copies(getattr(Ranks, name)))
        train(model, host, optimizer, 1)
    return alive.most


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"bits": 32}, marks=pytest.mark.slow),
        pytest.param({"root": "implicit", "codebook": "normal"}, marks=pytest.mark.slow),
        {"preset": "shampoo-compact"},
        {"min_quant_numel": 10**6},
        pytest.param({"method": "soap"}, marks=pytest.mark.slow),
        {"method": "soap", "bits": 4, "momentum_dtype": "int8", "second_moment_dtype": "int8"},
    ],
    ids=str,
)
def test_a_step_keeps_to_its_scratch_memory(options: dict[str, Any]) -> None:
    """In one process, ordinary, statistics and root steps of 2.4 million parameters, whatever is stored."""
    shapes = [(192, 192)] * 24 + [(768, 192)] * 5 + [(192, 500)] * 7
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    ways = {"statistics_interval": 2, "scratch_mib": 16, "max_preconditioner_dim": 256}
    if options.get("method") != "soap":
        ways |= {"method": "shampoo", "root_interval": 4}
    optimizer = Shampoo4(parameters, base="sgd", **ways, **options)
    for step in range(1, 10):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        binding = optimizer._session.current(optimizer.param_groups, optimizer.state, optimizer)
        alive = MostAlive()
        with alive, torch.no_grad():
            binding.precondition()
        assert alive.most <= 16 * 2**20, (step, alive.most / 2**20)
    assert alive.most > 2 * 2**20, "it is made use of"


# -- on ranks ----------------------------------------------------------------------------------------------------------


DEFAULT_BATCH = 256 * plan.BATCH_ELEMENTS_PER_MIB
FLIGHTS = [("ddp", 32, SMALL_BATCH), ("ddp", 96, SMALL_BATCH), ("fsdp2", 32, SMALL_BATCH), ("fsdp2", 96, SMALL_BATCH)]
FLIGHTS += [("ddp", 96, DEFAULT_BATCH), ("fsdp2", 96, DEFAULT_BATCH)]  # all of it is one batch


def on_a_rank(rank: int) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, int, int], int]]:
    measured = {(host, kind): measure(host, kind) for host in SPREAD for kind in OPTIONS}
    with pytest.MonkeyPatch.context() as monkeypatch:
        return measured, {flight: most_in_flight(*flight, monkeypatch) for flight in FLIGHTS}


@pytest.fixture(scope="module", params=slow_except([3], [2, 3, 4]))
def results(request: pytest.FixtureRequest) -> list[Any]:
    """What every rank has measured; one launch for all tests."""
    return hosts.run_ranks(request.param, on_a_rank)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("host", SPREAD)
def test_ranks_keep_and_send_what_was_estimated(host: str, kind: str, results: list[Any]) -> None:
    estimate = estimated(kind, host, len(results))
    kept = [measured[host, kind][0] for measured, _ in results]
    assert [count["preconditioner"] for count in kept] == estimate.preconditioner
    assert [count["base"] for count in kept] == estimate.base
    assert [measured[host, kind][1] for measured, _ in results] == estimate.traffic
    assert sum(estimate.traffic) > 0


def test_memory_in_flight_does_not_grow_with_depth(results: list[Any]) -> None:
    """It is that of a few batches: 3 where each element has one holder; under DDP directions go to all ranks, so each
    rank's buffers are those of every owner's batch: 2 and half a batch a rank. The norms are 16 bytes a block."""
    most = {flight: max(in_flight[flight] for _, in_flight in results) for flight in FLIGHTS}
    batch = 4 * SMALL_BATCH  # bytes
    for host, batches in (("fsdp2", 3.0), ("ddp", 2 + len(results) / 2)):
        shallow, deep = most[host, 32, SMALL_BATCH], most[host, 96, SMALL_BATCH]
        assert max(shallow, deep) - 16 * 96 <= batches * batch, most
        assert deep <= 1.25 * shallow, most
        assert most[host, 96, DEFAULT_BATCH] > 1.5 * deep, most


# -- shares ------------------------------------------------------------------------------------------------------------


def test_vit_shapes_are_the_published_ones() -> None:
    counts = [sum(torch.Size(shape).numel() for shape in vit_shapes(*size).values()) for size in (BASE, LARGE)]
    assert counts == [86_567_656, 304_326_632]


@pytest.mark.parametrize("host", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("size", "world_size"), [(BASE, 2), (BASE, 4), (BASE, 8), (LARGE, 8), (LARGE, 16)])
def test_every_rank_keeps_an_even_share(size: tuple[int, int], world_size: int, host: str) -> None:
    shapes = vit_shapes(*size)
    whole = estimate_memory(shapes, host="none").preconditioner[0]
    shares = estimate_memory(shapes, world_size, host=host).preconditioner
    assert sum(shares) == whole
    assert max(shares) <= 1.10 * whole / world_size


def test_every_owner_has_an_even_share_of_the_work() -> None:
    planned = []
    for name, shape in vit_shapes(*BASE).items():
        if view := matrix_view(name, shape, PreconditionerOptions()):
            matrix = view.shape
            rows, rest = shape[0], matrix[0] * matrix[1] // shape[0]
            edges = [min(rows, -(-rows // 4) * rank) * rest for rank in range(5)]
            shards = tuple(Shard(*edges[rank : rank + 2]) for rank in range(4))
            planned.append(PlannedMatrix(name, matrix, tuple(cut_blocks(matrix, Cutting(1024, "aligned"))), shards))
    loads = Plan(planned, 4).loads()
    assert max(loads) <= 1.10 * sum(loads) / 4
