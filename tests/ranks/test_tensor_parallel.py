"""FSDP2 and HSDP together with tensor and expert parallelism, on meshes of two and three dimensions."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import parallel
from support import worlds as hosts
from support.marks import slow_except
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.checkpoint.vectors import Interval
from sharded_shampoo4.placement import locate, shard_vector
from sharded_shampoo4.planning.plan import PlannedMatrix
from sharded_shampoo4.planning.shards import Shard as Held

# -- where elements are ------------------------------------------------------------------------------------------------

PLACED: list[tuple[tuple[int, ...], tuple[Placement, Placement]]] = [
    ((5, 7), (Shard(0), Shard(1))),
    ((5, 7), (Shard(1), Shard(0))),
    ((5, 7), (Shard(1), Replicate())),
    ((5, 7), (Shard(1), Shard(1))),
    ((3, 5, 7), (Shard(0), Shard(2))),
    ((3, 5, 7), (Shard(2), Shard(0))),
    ((3, 5, 7), (Replicate(), Shard(1))),
    ((1, 5, 7), (Shard(1), Shard(2))),
    ((1, 3), (Shard(1), Shard(0))),
    ((6, 4, 3, 3), (Shard(0), Shard(1))),
    ((8, 3), (_StridedShard(0, split_factor=2), Shard(0))),
]
UNEVEN = [((5, 7), 0), ((3, 4), 0), ((4, 9), 1), ((11,), 0)]  # shapes, and the dimension that is cut twice
if parallel.KNOWS_UNEVEN_PARTS:
    PLACED += [(shape, (_StridedShard(dim, split_factor=2), Shard(dim))) for shape, dim in UNEVEN]


def elements(shard: Held) -> list[int]:
    starts = (shard.start + number * shard.stride for number in range(shard.repeats))
    return [element for start in starts for element in range(start, start + shard.stop - shard.start)]


def places(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "ep"))
    located = []
    for shape, placements in PLACED:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        found = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        shard, local = locate("w", found), found.to_local()
        assert torch.equal(found.full_tensor(), whole)
        assert elements(shard) == local.flatten().tolist(), (shape, placements, shard)
        sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
        assert tuple(local.shape) == tuple(sizes)
        if shard.length:
            assert shard.start == int(whole[tuple(offsets)])
        vector = torch.arange(13)
        assert torch.equal(shard_vector(vector, found).full_tensor(), vector)
        located.append(shard)
    experts = {}
    for dimension in (0, 1):
        model = parallel.Experts()
        whole = {name: torch.arange(p.numel()).view(p.shape).float() for name, p in model.named_parameters()}
        model.load_state_dict(whole)
        for name, parameter in parallel.wrap_experts(model, dimension, mesh).named_parameters():
            shard, local = locate(name, parameter), parameter.to_local()
            assert elements(shard) == local.flatten().tolist(), (name, parameter.placements)
            experts[name, dimension] = shard
    return {"located": located, "experts": experts}


def test_elements_are_where_torch_has_them() -> None:
    ranks = hosts.run_ranks(4, places)
    for number, (shape, placements) in enumerate(PLACED):
        shards = tuple(told["located"][number] for told in ranks)
        PlannedMatrix(str(placements), (1, torch.Size(shape).numel()), (), shards).check()
        copies = 2 if Replicate() in placements else 1
        assert sum(shard.length for shard in shards) == copies * torch.Size(shape).numel()
        assert len({shard.replica for shard in shards}) == copies
    for name in ("w1", "w2"):
        for dimension in (0, 1):
            shards = tuple(told["experts"][name, dimension] for told in ranks)
            PlannedMatrix(name, (5, 120), (), shards).check()
            assert len({shard.stride for shard in shards if shard.length}) == 1
        assert {told["experts"]["router.weight", dimension].replica for told in ranks} == {0, 1}


def uneven(rank: int) -> list[tuple[Held, Tensor]]:
    """Rows that tensor parallelism cuts unevenly, on three ranks: torch's ``full_tensor()`` takes them for others."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("shard", "tp"))
    found = []
    for rows in (7, 13, 3):
        model = nn.Linear(2, rows)
        model.load_state_dict({"weight": torch.arange(2.0 * rows).view(rows, 2), "bias": torch.arange(1.0 * rows)})
        parallelize_module(model, mesh["tp"], ColwiseParallel())
        fully_shard(model, mesh=mesh["shard"])
        found += [(locate(name, p), p.to_local().detach().flatten()) for name, p in model.named_parameters()]
    return found


@pytest.mark.slow
def test_elements_are_where_fsdp2_has_them() -> None:
    for shards in zip(*hosts.run_ranks(6, uneven), strict=True):
        assert all(elements(shard) == local.tolist() for shard, local in shards)
        PlannedMatrix("w", (1, sum(len(local) for _, local in shards)), (), tuple(shard for shard, _ in shards)).check()


# -- training ----------------------------------------------------------------------------------------------------------

USUAL: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "statistics_interval": 2, "max_preconditioner_dim": 16}
METHODS: dict[str, dict[str, Any]] = {
    "soap": {"min_quant_numel": 0},
    "compact": {"preset": "compact", "min_quant_numel": 0},
    "shampoo": {"method": "shampoo", "root_interval": 2, "bits": 4, "min_quant_numel": 0},
}
BEFORE, AFTER = range(3), range(3, 6)


def make(layout: str, method: str, **options: Any) -> tuple[nn.Module, Shampoo4]:
    model = parallel.wrap(parallel.make_llama(), layout, **options)
    return model, Shampoo4(model.named_parameters(), **USUAL, **METHODS[method])


@functools.cache
def one_process(method: str) -> dict[str, Tensor]:
    with hosts.one_thread():
        model, optimizer = make("none", method)
        return parallel.advance(model, optimizer, range(AFTER.stop))


def train(rank: int, layout: str) -> dict[str, tuple[dict[str, Tensor], int]]:
    """With the compact preset, tensor parallelism leaves the head and the embedding to FSDP2."""
    found = {}
    for method in METHODS:
        model, optimizer = make(layout, method, lm_head=method != "compact")
        trained = parallel.advance(model, optimizer, range(AFTER.stop))
        found[method] = (trained, optimizer.state_bytes()["preconditioner"])
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: Any) -> None:
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert list(found) == list(expected) and not differing, (what, differing)


@pytest.mark.parametrize("layout", slow_except(["tp"], ["tp", "tp alone", "hsdp and tp", "all of them"]))
def test_the_same_training_as_in_one_process(layout: str) -> None:
    ranks = hosts.run_ranks(math.prod(parallel.LAYOUTS[layout]), train, layout)
    for method in METHODS:
        held = [told[method][1] for told in ranks]
        assert max(held) < 0.5 * sum(held), (method, held)
        for told in ranks:
            assert_equal(told[method][0], one_process(method), method)


def make_experts(dimension: int | None, method: str) -> tuple[nn.Module, Shampoo4]:
    """Experts on a 2 x 2 mesh, a ``dimension`` of which FSDP2 cuts; in one process without it."""
    torch.manual_seed(0)
    model: nn.Module = parallel.Experts()
    if dimension is not None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "ep"))
        model = parallel.wrap_experts(model, dimension, mesh)
    named = dict(model.named_parameters())
    first = {"params": [("w1", named.pop("w1"))], "split_rows": (4, 6)}
    return model, Shampoo4([first, {"params": list(named.items())}], **USUAL, **METHODS[method])


def train_experts(rank: int, dimension: int | None) -> dict[str, dict[str, Tensor]]:
    found = {}
    for method in METHODS:
        model, optimizer = make_experts(dimension, method)
        for step in range(AFTER.stop):
            generator = torch.Generator().manual_seed(step)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            hosts.set_gradients(model, "none" if dimension is None else "fsdp2", gradients)
            optimizer.step()
        found[method] = hosts.full_parameters(model, "none" if dimension is None else "fsdp2")
        assert "as 4 + 6 + 4 + ... rows x 12" in optimizer.describe() and "as 5 of 12 x 10" in optimizer.describe()
    return found


@pytest.mark.parametrize("dimension", slow_except([1], [0, 1]))
def test_experts_train_as_in_one_process(dimension: int) -> None:
    """Each has its own factors, and its own norm where directions are grafted, on whatever ranks its rows are."""
    with hosts.one_thread():
        expected = train_experts(0, None)
    for told in hosts.run_ranks(4, train_experts, dimension):
        for method in METHODS:
            assert_equal(told[method], expected[method], method)


# -- states ------------------------------------------------------------------------------------------------------------


def resume(layout: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Load what was saved after the first steps and take the others, in one process or on these ranks."""
    model, optimizer = make(layout, folder.name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load(optimizer, folder, model=model)
    return parallel.advance(model, optimizer, AFTER)


def save(layout: str, folder: Path) -> tuple[nn.Module, Shampoo4]:
    model, optimizer = make(layout, folder.name)
    parallel.advance(model, optimizer, BEFORE)
    checkpoint.save(optimizer, folder, model=model)
    return model, optimizer


def move(rank: int, folder: Path, method: str) -> dict[str, dict[str, Tensor]]:
    model, optimizer = save("tp", folder / "tp" / method)
    save("fsdp2", folder / "fsdp2" / method)
    found = {"by state_dict": went_on(model, optimizer, method)}
    for source, layout in (("none", "tp"), ("fsdp2", "tp"), ("tp", "fsdp2"), ("tp", "tp alone"), ("tp", "tp")):
        found[f"{source} to {layout}"] = resume(layout, folder / source / method)
    return found


def went_on(model: nn.Module, optimizer: Shampoo4, method: str) -> dict[str, Tensor]:
    """Hand the states on by ``state_dict()``, then whole by torch's functions, and take the other steps."""
    second, another = make("tp", method)
    second.load_state_dict(model.state_dict())
    another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    parallel.advance(second, another, AFTER[:1])
    third, last = make("tp", method)
    third.load_state_dict(second.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    state = get_optimizer_state_dict(second, another, options=options)
    set_optimizer_state_dict(third, last, state if dist.get_rank() == 0 else {}, options=options)
    return parallel.advance(third, last, AFTER[1:])


@pytest.mark.parametrize("method", slow_except(["shampoo"], METHODS))
def test_states_move_to_and_from_other_layouts(method: str, tmp_path: Path) -> None:
    with hosts.one_thread():
        save("none", tmp_path / "none" / method)
        for told in hosts.run_ranks(4, move, tmp_path, method):
            for way, found in told.items():
                assert_equal(found, one_process(method), way)
        assert_equal(resume("none", tmp_path / "tp" / method), one_process(method), "tp to none")


@pytest.mark.parametrize("stored", [(60,), (5, 12), (15, 4), (1, 60)], ids=str)
def test_parts_of_what_files_hold(stored: tuple[int, ...]) -> None:
    """Files have a vector or a table; this rank has rows, an interval that begins anywhere, or columns."""
    whole = torch.arange(60).view(stored)
    for shard in (Held(12, 36), Held(7, 55), Held(16, 19, 0, 3, 12), Held(4, 8, 0, 5, 12), Held(5, 7, 0, 10, 4)):
        memory = torch.full((3 + shard.length,), -1)  # this rank's part begins with the fourth element
        part = Interval.of(memory[3:], shard, 60)
        part.read_from(whole.shape)
        assert part.size() == whole.shape and len(part.__create_chunk_list__()) <= 3
        for chunk in part.__create_chunk_list__():
            place = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
            part.__get_tensor_shard__(MetadataIndex("", chunk.offsets)).copy_(whole[place])
        part.settle()
        assert memory.tolist() == [-1, -1, -1, *elements(shard)], shard
        written = Interval.of(memory[3:], shard, 60)
        (item,) = written.__create_write_items__("", None)
        values = written.__get_tensor_shard__(item.index)
        assert values.flatten().tolist() == elements(shard) and item.tensor_data.chunk.sizes == values.shape


# -- sequence parallelism ----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A norm and two projections. With sequence parallelism each rank has a part of the norm's gradient, a summand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(self.norm(tokens)).relu())
        return found


def train_normed(part: int, parts: int, mesh: Any) -> dict[str, Tensor]:
    model = Normed()
    if mesh is not None:
        ways = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1))}
        parallelize_module(model, mesh, {**ways, "down": RowwiseParallel(output_layouts=Shard(1))})
    optimizer = Shampoo4(model.named_parameters(), lr=0.01, precondition=False)
    tokens = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).chunk(parts, 1)[part]
    for _ in range(4):
        model(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


def normed_on_a_rank(rank: int) -> dict[str, Tensor]:
    return train_normed(rank, 2, init_device_mesh("cpu", (2,)))


def test_norms_of_sequence_parallelism() -> None:
    expected = train_normed(0, 1, None)
    for found in hosts.run_ranks(2, normed_on_a_rank):
        for name in ("norm.weight", "norm.bias"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, str]:
    pair = dist.new_subgroups(2)[0]
    mesh = init_device_mesh("cpu", (2, 2))

    def step(placements: list[Placement], shape: tuple[int, ...] = (4, 4, 6), **options: Any) -> None:
        parameter = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements, src_data_rank=None))
        parameter.grad = torch.ones_like(parameter)
        Shampoo4([("w", parameter)], **options).step()

    def not_added_up() -> None:
        parameter = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Replicate(), Replicate()]))
        gradient = DTensor.from_local(torch.ones(4, 6), mesh, [Partial(), Replicate()], run_check=False)
        parameter.grad = gradient
        Shampoo4([("w", parameter)]).step()

    def other_sizes() -> None:
        """Two rows of five on every rank, where the placements say that two ranks have a single one."""
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        rows = DTensor.from_local(
            torch.ones(2, 6), mesh, placements, run_check=False, shape=torch.Size((5, 6)), stride=(6, 1)
        )
        parameter = nn.Parameter(rows)
        parameter.grad = torch.ones_like(parameter)
        Shampoo4([("w", parameter)]).step()

    return {
        "two of three": hosts.said(lambda: step([Shard(1), Shard(2)])),
        "another factor": hosts.said(lambda: step([_StridedShard(0, split_factor=3), Shard(0)])),
        "sizes": hosts.said(other_sizes),
        "not added up": hosts.said(not_added_up),
        "pair": hosts.said(lambda: step([Shard(0), Shard(1)], process_group=pair)),
        "alone": hosts.said(lambda: step([_StridedShard(0, split_factor=2), Shard(0)], process_group="alone")),
        "understood": hosts.said(lambda: step([Shard(0), Shard(2)])),
    }


def test_what_is_not_understood_is_refused_on_every_rank() -> None:
    for told in hosts.run_ranks(4, refusals):
        for case, part in (("two of three", "no more than two dimensions"), ("another factor", "_StridedShard that")):
            assert "w of shape (4, 4, 6) has placements (" in told[case] and part in told[case], told[case]
            assert "precondition=False" in told[case]
        assert "w has 12 elements on this rank where elements " in told["sizes"]
        assert (
            "its gradient has (Partial(sum), Replicate()): call p.grad = p.grad.redistribute(" in told["not added up"]
        )
        assert "w is on a mesh of ranks [0, 1, 2, 3]: leave process_group out" in told["pair"]
        assert "w is sharded over ranks [0, 1, 2, 3]" in told["alone"]
        assert told["understood"] == "nothing was raised"
