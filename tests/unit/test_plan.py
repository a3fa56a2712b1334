"""Plans are pure data: every element travels exactly once there and back, on any layout of shards."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_shampoo4.planning import copies
from sharded_shampoo4.planning.blocks import Block, Cutting, cut_blocks
from sharded_shampoo4.planning.plan import Plan, PlannedMatrix
from sharded_shampoo4.planning.routes import Routes, Way
from sharded_shampoo4.planning.shards import Shard, interval_pieces, make_shard, shard_pieces


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_of_an_interval(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    row, column = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, n - 1))
    block = Block(row, column, data.draw(st.integers(1, m - row)), data.draw(st.integers(1, n - column)))
    start = data.draw(st.integers(0, m * n))
    stop = data.draw(st.integers(start, m * n))
    numbers = torch.arange(m * n).view(m, n)
    inside = [i for i in numbers[block.slices].flatten().tolist() if start <= i < stop]
    pieces = interval_pieces(block, n, start, stop)
    assert [i for piece in pieces for i in numbers[piece.slices].flatten().tolist()] == inside
    assert len(pieces) <= 3


def numbers_of(shard: Shard) -> Tensor:
    """The elements of a shard, in the order of the local tensor."""
    starts = [shard.start + number * shard.stride for number in range(shard.repeats)]
    return torch.cat([torch.arange(start, start + shard.stop - shard.start) for start in starts])


def boxes(shape: tuple[int, ...], cuts: Sequence[Sequence[int]]) -> list[Shard]:
    """What ranks hold of a tensor whose first dimension and one more are cut at these places."""
    first, *_, second = cuts
    inner = math.prod(shape[len(cuts) :])
    stride, rows = shape[len(cuts) - 1] * inner, math.prod(shape[1 : len(cuts) - 1])
    return [
        make_shard(
            top * rows * stride + left * inner, top * rows * stride + right * inner, 0, (end - top) * rows, stride
        )
        for top, end in itertools.pairwise(first)
        for left, right in itertools.pairwise(second)
    ]


def edges(draw: st.DrawFn, size: int, parts: int) -> list[int]:
    return [0, *sorted(draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1))), size]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_of_boxes(data: st.DataObject) -> None:
    """Tensors cut in their first and in another dimension, seen as matrices: each element is in one piece."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    second = data.draw(st.integers(1, len(shape) - 1))
    places = [edges(data.draw, size, 2) for size in shape[: second + 1]]
    columns = math.prod(shape[data.draw(st.integers(1, len(shape) - 1)) :])
    matrix = (math.prod(shape) // columns, columns)
    numbers, local = torch.arange(math.prod(shape)).view(shape), boxes(shape, places)
    blocks = cut_blocks(matrix, Cutting(data.draw(st.integers(1, 6)), "even"))
    plan = Plan([PlannedMatrix("w", matrix, tuple(blocks), tuple(local))], len(local))
    seen = torch.zeros(len(local), numbers.numel(), dtype=torch.int)
    for rank, shard in enumerate(local):
        top, left = divmod(rank, len(places[-1]) - 1)
        parts = [slice(None)] * len(shape)
        parts[second], parts[0] = slice(*places[-1][left : left + 2]), slice(*places[0][top : top + 2])
        held = numbers[tuple(parts)].flatten().clone()
        assert torch.equal(numbers_of(shard), held) and shard.length == len(held)
        for element in range(numbers.numel() + 1):
            assert shard.before(element) == (held < element).sum()
        for block in blocks:
            pieces = shard_pieces(block, columns, shard)
            assert pieces == [piece for holder, piece in plan._holders[0].pieces(block) if holder == rank]
            for piece in pieces:
                inside = numbers.view(matrix)[piece.slices]
                strides = (shard.row_width(columns), 1)
                assert torch.equal(held.as_strided(inside.shape, strides, shard.place(int(inside[0, 0]))), inside)
                seen[rank, inside.flatten()] += 1
        assert torch.equal(seen[rank].nonzero().flatten(), held.sort().values)
    assert (seen.sum(0) == 1).all()


@st.composite
def plans(draw: st.DrawFn, twins: bool = False) -> Plan:
    """Random matrices over random replicas, each cut at random places: uneven and empty shards are ordinary.

    Some are cut in two dimensions, at equal places in all replicas.
    ``twins``: all replicas of a matrix are cut at the same places, as under HSDP, or under DDP not at all.
    """
    replicas, ranks = draw(st.integers(2 if twins else 1, 3)), draw(st.integers(1, 4))
    matrices = []
    for index in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
        size = shape[0] * shape[1]
        shards: list[Shard] = []
        cuts: list[int] = []
        across = draw(st.sampled_from([number for number in range(1, ranks + 1) if ranks % number == 0]))
        if across > 1:
            stride = draw(st.sampled_from([number for number in range(1, size + 1) if size % number == 0]))
            table = (size // stride, stride)
            one = boxes(table, [edges(draw, table[0], ranks // across), edges(draw, table[1], across)])
            shards = [shard._replace(replica=replica) for replica in range(replicas) for shard in one]
        for replica in range(replicas if across == 1 else 0):
            if replica == 0 or not twins:
                cuts = sorted(draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)))
            shards += [Shard(*edges, replica) for edges in zip([0, *cuts], [*cuts, size], strict=True)]
        split = draw(st.sampled_from(["aligned", "even", "remainder"]))
        blocks = cut_blocks(shape, Cutting(draw(st.integers(1, 12)), split, draw(st.integers(0, 2))))
        matrices.append(PlannedMatrix(f"matrix {index}", shape, tuple(blocks), tuple(shards)))
    return Plan(matrices, replicas * ranks)


@settings(max_examples=150, deadline=None)
@given(st.one_of(plans(), plans(twins=True)))
def test_every_element_travels_once_there_and_back(plan: Plan) -> None:
    arrived = [torch.zeros(matrix.shape, dtype=torch.int) for matrix in plan.matrices]
    returned = [
        [torch.zeros(matrix.shape, dtype=torch.int) for matrix in plan.matrices] for _ in range(plan.world_size)
    ]
    sent = [0] * plan.world_size
    for number in range(plan.rounds):
        rounds = [plan.round(rank, number) for rank in range(plan.world_size)]
        shared = [0] * plan.world_size  # of the directions that a rank gets in its replica
        for owner in range(plan.world_size):
            batch = plan.batches[owner][number] if number < len(plan.batches[owner]) else []
            for holder in range(plan.world_size):
                outgoing, incoming = rounds[holder].to_owner[owner], rounds[owner].from_holder[holder]
                if plan.twins and holder not in plan.twins.mates(owner):
                    assert not incoming and not any(mine.gives_gradient for mine in outgoing)
                    for mine in outgoing:
                        returned[holder][mine.matrix][mine.piece.slices] += 1
                    continue
                assert len(outgoing) == len(incoming)
                for mine, theirs in zip(outgoing, incoming, strict=True):
                    matrix, block = batch[theirs.position]
                    row, column = mine.piece.row - block.row, mine.piece.column - block.column
                    assert (matrix, mine.gives_gradient) == (mine.matrix, theirs.gives_gradient)
                    assert theirs.piece == mine.piece._replace(row=row, column=column)
                    returned[holder][matrix][mine.piece.slices] += 1
                    count = mine.piece.rows * mine.piece.columns
                    shared[holder] += count
                    if mine.gives_gradient:
                        arrived[matrix][mine.piece.slices] += 1
                    if holder != owner:
                        sent[holder] += count * mine.gives_gradient
                        sent[owner] += count * (mine.gives_gradient or not plan.twins)
        for rank in range(plan.world_size):
            sent[rank] += sum(max(shared[twin] for twin in plan.twins.of(rank)) for _ in plan.twins.of(rank)[1:])
    assert all((counts == 1).all() for counts in arrived)
    for rank in range(plan.world_size):
        for matrix, counts in zip(plan.matrices, returned[rank], strict=True):
            held = torch.zeros(counts.numel(), dtype=torch.int)
            held[numbers_of(matrix.shards[rank])] = 1
            assert torch.equal(counts.flatten(), held)
    assert sent == plan.elements_sent()
    owned = sorted(member for batches in plan.batches for batch in batches for member in batch)
    assert owned == sorted(plan.blocks)


def carry(
    plan: Plan, ways: Sequence[Way], sources: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]
) -> None:
    """Do for all ranks what an exchange does for each."""
    sent = []
    for way, tensors in zip(ways, sources, strict=True):
        message = torch.empty(sum(way.sent), dtype=torch.int64)
        way.pack.run(tensors, [message])
        sent.append(message.split(way.sent))
    received = [torch.cat([message[rank] for message in sent]) for rank in range(len(ways))]
    shared = {}
    for rank, (way, tensors) in enumerate(zip(ways, targets, strict=True)):
        assert [len(message[rank]) for message in sent] == way.received
        if way.shared is None:
            way.here.run(sources[rank], tensors)
            way.unpack.run([received[rank]], tensors)
        else:
            shared[rank] = torch.cat([received[rank], torch.full((way.shared - len(received[rank]),), -2)])
            way.here.run(sources[rank], [shared[rank]])
    for rank in shared:
        joined = torch.cat([shared[twin] for twin in plan.twins.of(rank)])
        ways[rank].unpack.run([joined], targets[rank])


@pytest.mark.parametrize("by_rows", [False, True], ids=["as views", "by rows"])
@settings(max_examples=150, deadline=None)
@given(plan=st.one_of(plans(), plans(twins=True)), data=st.data())
def test_routes_bring_chosen_gradients_to_the_owners_and_directions_back(
    plan: Plan, data: st.DataObject, by_rows: bool
) -> None:
    """Gradients count their elements, directions are gradients plus 1000; what stays away is -1."""
    few = -1 if by_rows else 10**9
    with mock.patch.multiple(copies, SHORTEST_ROW=1, FEW_COPIES=few):
        check_routes(plan, data)


def check_routes(plan: Plan, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=len(plan.matrices), max_size=len(plan.matrices))
    active = data.draw(flags)
    directed = [a and d for a, d in zip(active, data.draw(flags), strict=True)]
    everyone = range(plan.world_size)
    held = [[numbers_of(matrix.shards[rank]) for matrix in plan.matrices] for rank in everyone]
    padded = [[torch.cat([torch.zeros(2, dtype=torch.int64), shard])[2:] for shard in shards] for shards in held]
    written = [[torch.full_like(shard, -1) for shard in shards] for shards in held]
    numbers = [torch.arange(matrix.shape[0] * matrix.shape[1]).view(matrix.shape) for matrix in plan.matrices]
    for parts in zip(*(Routes(plan, rank).parts(active, directed) for rank in everyone), strict=True):
        blocks = [[plan.blocks[number] for number in part.blocks] for part in parts]
        batches = [
            [torch.full((len(members), members[0].block.rows, members[0].block.columns), -1)] if members else []
            for members in blocks
        ]
        carry(plan, [part.gradients for part in parts], padded, batches)
        for part, rank, members, batch in zip(parts, everyone, blocks, batches, strict=True):
            assert members == [plan.batches[rank][part.number][position] for position in part.chosen]
            for values, (index, block) in zip(batch[0] if batch else [], members, strict=True):
                assert active[index] and torch.equal(values, numbers[index][block.slices])
        returned = [[batch + 1000 for batch in some] for some in batches]
        carry(plan, [part.directions for part in parts], returned, written)
    for shards, directions in zip(held, written, strict=True):
        for shard, values, comes_back in zip(shards, directions, directed, strict=True):
            assert torch.equal(values, shard + 1000 if comes_back else torch.full_like(shard, -1))


def test_blocks_that_lie_alike_are_copied_as_one() -> None:
    """Matrices that are cut by rows, by columns and by both, in one process: each is copied as one view."""
    shapes = [(12, 4), (4, 12), (12, 12)]
    matrices = [
        PlannedMatrix(str(shape), shape, tuple(cut_blocks(shape, Cutting(4, "even"))), (Shard(0, shape[0] * shape[1]),))
        for shape in shapes
    ]
    (part,) = Routes(Plan(matrices, 1), 0).parts([True] * 3, [True] * 3)
    assert len(part.blocks) == 3 + 3 + 9
    assert len(part.gradients.here) == len(part.directions.here) == 3


def sharded_rows(name: str, shape: tuple[int, int], world_size: int, limit: int = 1024) -> PlannedMatrix:
    """As FSDP2 shards: equal numbers of rows, the last ranks fewer or none."""
    rows = -(-shape[0] // world_size)
    edges = [min(shape[0], rank * rows) * shape[1] for rank in range(world_size + 1)]
    shards = tuple(Shard(start, stop) for start, stop in itertools.pairwise(edges))
    return PlannedMatrix(name, shape, tuple(cut_blocks(shape, Cutting(limit, "even"))), shards)


def vit(width: int, depth: int, world_size: int) -> list[PlannedMatrix]:
    shapes = {"position": (197, width), "patch": (width, 768), "head": (1000, width)}
    for layer in range(depth):
        shapes |= {f"{layer}.{name}": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.fc1": (4 * width, width), f"{layer}.fc2": (width, 4 * width)}
    return [sharded_rows(name, shape, world_size) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("width", "depth", "world_size"), [(768, 12, 2), (768, 12, 4), (768, 12, 8), (1024, 24, 8), (1024, 24, 16)]
)
def test_work_is_balanced(width: int, depth: int, world_size: int) -> None:
    loads = Plan(vit(width, depth, world_size), world_size).loads()
    assert max(loads) <= 1.10 * sum(loads) / world_size


def test_a_thousand_ranks_plan_in_seconds() -> None:
    start = time.process_time()
    plan = Plan(vit(1024, 24, 1024), 1024)
    for number in range(plan.rounds):
        plan.round(517, number)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("across", [8, 1024])
def test_a_thousand_ranks_with_tensor_parallelism_plan_in_seconds(across: int) -> None:
    start = time.process_time()
    matrices = []
    for layer in range(24):
        for name, shape in {"q": (1024, 1024), "fc2": (1024, 4096)}.items():
            cuts = [[number * size // parts for number in range(parts + 1)]
                    for size, parts in zip(shape, (1024 // across, across), strict=True)]  # fmt: skip
            blocks = tuple(cut_blocks(shape, Cutting(256, "even")))
            matrices.append(PlannedMatrix(f"{layer}.{name}", shape, blocks, tuple(boxes(shape, cuts))))
    plan = Plan(matrices, 1024)
    for number in range(plan.rounds):
        plan.round(517, number)
    assert time.process_time() - start < 20


def test_shards_that_do_not_tile() -> None:
    blocks = (Block(0, 0, 4, 4),)
    with pytest.raises(ValueError, match=r"shards of w in replica 0 do not tile its 16 elements: \[0, 8\), \[9, 16\)"):
        Plan([PlannedMatrix("w", (4, 4), blocks, (Shard(0, 8), Shard(9, 16)))], 2)
    for third in (Shard(2, 3, 0, 4, 4), Shard(2, 4, 0, 3, 4), Shard(1, 4, 0, 4, 4), Shard(8, 16)):
        shards = (Shard(0, 2, 0, 2, 4), Shard(8, 10, 0, 2, 4), third)
        with pytest.raises(ValueError, match=r"do not tile its 16 elements: \[0, 2\) 2 times, each 4 on, \["):
            Plan([PlannedMatrix("w", (4, 4), blocks, shards)], 3)
    Plan([PlannedMatrix("w", (4, 4), blocks, (*shards[:2], Shard(2, 4, 0, 4, 4)))], 3)
    with pytest.raises(ValueError, match="no rank holds any element of w"):
        Plan([PlannedMatrix("w", (4, 4), blocks, (Shard(0, 0), Shard(0, 0)))], 2)
