"""A block's numbers do not depend on the blocks that share its batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.directions import Directions, replayed

from sharded_shampoo4.numerics import factors
from sharded_shampoo4.planning import plan


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


WAYS = {
    "4 bits": {},
    "32 bits": {"bits": 32},
    "implicit roots": {"root": "implicit"},
    "compact": {"preset": "shampoo-compact"},
    "products in bfloat16": {"matmul_dtype": "bfloat16"},
    "soap, 4 bits": {"method": "soap", "bits": 4, "momentum_dtype": "int8", "second_moment_dtype": "int8"},
    "soap, 32 bits": {"method": "soap", "bits": 32, "refresh_dtype": "float64"},
}


SHAPES = [(2, 3), (10, 64), (48, 48), (64, 65), (96, 130), (65, 200), (147, 64), (384, 96)]
FEW = [(48, 48), (65, 200), (384, 96)]
OF_FEW = ("implicit roots", "products in bfloat16", "soap, 32 bits")
CASES = [(shape, way) for way in WAYS for shape in (FEW if way in OF_FEW else SHAPES)]
THREADS = [
    pytest.param(1, *case, marks=() if case[0] in FEW else pytest.mark.slow, id=f"1 thread-{case}") for case in CASES
] + [
    pytest.param(2, *case, marks=() if case[0] in FEW[:2] else pytest.mark.slow, id=f"2 threads-{case}")
    for case in CASES
]


@pytest.mark.parametrize(("threads", "shape", "way"), THREADS, indirect=["threads"])
def test_alone_and_in_company(threads: int, shape: tuple[int, int], way: str) -> None:
    options = {"statistics_interval": 2, "min_quant_numel": 0, **WAYS[way]}
    if not way.startswith("soap"):
        options["root_interval"] = 4
    gradients = replayed([shape] * 5, steps=9)
    batched = Directions([shape] * 5, **options)
    alone = Directions([shape], **options)
    pair = Directions([shape] * 2, **options)
    for step in gradients:
        expected = batched.step(step)
        assert torch.equal(alone.step([step[3]])[0], expected[3])
        assert all(map(torch.equal, pair.step([step[4], step[1]]), (expected[4], expected[1])))


@pytest.mark.parametrize("method", ["shampoo", "soap"])
def test_chunks_change_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds on memory in flight cut batches elsewhere; the numbers stay."""
    options = {"statistics_interval": 2, "max_preconditioner_dim": 64, "method": method}
    if method == "shampoo":
        options["root_interval"] = 4
    shapes = [(130, 96), (64, 200), (10, 64)]
    gradients = replayed(shapes, steps=9)
    whole = Directions(shapes, **options)
    expected = [whole.step(step) for step in gradients]
    monkeypatch.setattr(factors, "REFRESH_ELEMENTS_PER_MIB", 0)
    monkeypatch.setattr(plan, "BATCH_ELEMENTS_PER_MIB", 0)
    cut = Directions(shapes, **options)
    for step, directions in zip(gradients, expected, strict=True):
        assert all(map(torch.equal, cut.step(step), directions))
    counts = [len(run.optimizer._session.last.preconditioner.batches) for run in (cut, whole)]
    assert counts[0] > counts[1]


def test_equal_orders_share_a_pool() -> None:
    run = Directions([(64, 64), (64, 64), (64, 96), (96, 64)])
    run.step(replayed([(64, 64), (64, 64), (64, 96), (96, 64)], 1)[0])
    pools = {pool.order: pool.count for pool in run.optimizer._session.last.preconditioner.pools}
    assert pools == {64: 6, 96: 2}


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("order", [10, 64])
def test_staggered_steps_in_which_one_side_is_due(threads: int, order: int) -> None:
    """Products of orders that do not fill cache lines, or on several threads, are computed one by one."""
    options = {"method": "soap", "refresh": "staggered", "statistics_interval": 4}
    fast = Directions([(order, order)], **options)
    for gradients in replayed([(order, order)], 9):
        (direction,) = fast.step(gradients)
        assert direction is not None and direction.isfinite().all()
