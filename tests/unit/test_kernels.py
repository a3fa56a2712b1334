"""What steps ask of a GPU, counted without one: no synchronization and no copy from the host, and few kernels.

ViT-B/16 with all of its 12 layers and 1000 classes, the default and the compact settings, in one process and on one
rank of eight under FSDP2. The base is AdamW with ``foreach``, whose kernels are counted too. Other layouts of the
factors are not counted here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kernels import Counts, CountWork, launches
from support.marks import slow_except
from support.meta_steps import (
    LAYOUTS,
    RANK,
    VIT_B,
    StepCounts,
    count_soap_of_vit_b,
    count_step,
    count_vit_b,
    whole_parameters,
)
from support.vit import vit_shapes
from torch import Tensor

from sharded_shampoo4 import Shampoo4, estimate_memory

# The most kernels of a step: what was counted, and 5 % more. A change that needs fewer should lower them.
BOUNDS = {
    (1, "default"): {"ordinary": 253, "statistics": 1_839, "roots": 3_003},
    (1, "compact"): {"ordinary": 369, "statistics": 2_613, "roots": 2_938},
    (8, "default"): {"ordinary": 183, "statistics": 348, "roots": 649},
    (8, "compact"): {"ordinary": 230, "statistics": 477, "roots": 669},
}
# Likewise of operators in an ordinary step, views and allocations among them: each takes the host about a microsecond.
OPERATORS = {(1, "default"): 523, (1, "compact"): 671, (8, "default"): 395, (8, "compact"): 455}

# Of method="soap", by ranks, of an ordinary step and of one with refreshes: kernels, and bytes that they move for each
# parameter of the model, on all ranks together.
SOAP_BOUNDS = {1: (417, 1_923), 8: (85, 292)}
VIT_B_NUMEL = 86_567_656
SOAP_BYTES = {1: (262, 1_338), 8: (357, 1_410)}


AGREEMENTS = {"send": 2 * 3, "recv_": 2 * 3}  # of a step on one of 8 ranks: two, with log2(8) messages each


@pytest.fixture(params=BOUNDS, ids=lambda case: f"{case[0]} rank{'s' * (case[0] > 1)}, {case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[int, str]:
    return request.param


@pytest.fixture
def counted(case: tuple[int, str]) -> StepCounts:
    return count_vit_b(*case)


# -- steps of ViT-B ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["before_roots", "ordinary"])
def test_an_ordinary_step_never_waits_for_the_gpu_and_copies_nothing_to_it(counted: StepCounts, kind: str) -> None:
    step: Counts = getattr(counted, kind)
    assert step.synchronizations == 0, step.synchronizations_by
    assert step.copies == 0


@pytest.mark.parametrize("kind", ["ordinary", "statistics", "roots"])
def test_a_step_launches_few_kernels(case: tuple[int, str], counted: StepCounts, kind: str) -> None:
    step: Counts = getattr(counted, kind)
    print(f"{case}, {kind}: {step.kernels} kernels, {step.operators} operators, {step.views} of them views")
    assert step.kernels <= BOUNDS[case][kind], step.kernels_by.most_common(12)
    assert step.kernels > BOUNDS[case][kind] / 2, "half as many as they may be: lower the bound"


def test_an_ordinary_step_calls_few_operators(case: tuple[int, str], counted: StepCounts) -> None:
    assert OPERATORS[case] / 2 < counted.ordinary.operators <= OPERATORS[case]
    assert counted.before_roots.operators < 10, "the base's alone"


def test_a_step_before_the_first_roots_launches_what_the_base_does(case: tuple[int, str], counted: StepCounts) -> None:
    parameters = whole_parameters(VIT_B)
    base = torch.optim.AdamW(parameters.values(), foreach=True, weight_decay=0.0)
    _, alone = (count_step(base, parameters.values()) for _ in range(2))
    if case[0] == 1:
        assert counted.before_roots.kernels_by == alone.kernels_by
    else:  # of smaller tensors
        assert counted.before_roots.kernels_by.keys() == alone.kernels_by.keys()
        assert counted.before_roots.kernels <= alone.kernels


@pytest.mark.parametrize("kind", ["statistics", "roots"])
def test_a_refresh_reads_back_one_number_for_each_order_of_factors(counted: StepCounts, kind: str) -> None:
    orders = {197, 500, 768, 1000, 1024}
    step: Counts = getattr(counted, kind)
    assert step.synchronizations <= len(orders), step.synchronizations_by
    assert step.copies <= 30, "places of factors: kept, and copied once"


def test_collectives_of_a_rank(counted: StepCounts, case: tuple[int, str]) -> None:
    """Gradients to owners and directions back, four rounds each, a sum of norms; and flags, twice, on the host."""
    if case[0] == 1:
        assert not counted.ordinary.collectives and not counted.roots.host_collectives
        return
    assert not counted.before_roots.collectives
    for step in (counted.before_roots, counted.ordinary, counted.statistics, counted.roots):
        assert step.host_collectives == AGREEMENTS
        assert step.collectives["alltoall_base_"] <= 8
        assert step.collectives.keys() <= {"alltoall_base_", "allreduce_"}
    assert counted.ordinary.collectives["allreduce_"] == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rank_that_is_simulated_keeps_and_sends_what_is_estimated(layout: str) -> None:
    counted = count_vit_b(8, layout)
    estimate = estimate_memory(VIT_B, 8, **LAYOUTS[layout])
    assert counted.state_bytes == {"preconditioner": estimate.preconditioner[RANK], "base": estimate.base[RANK]}
    assert counted.ordinary.sent["alltoall_base_"] == estimate.traffic[RANK] > 0
    blocks = counted.ordinary.sent["allreduce_"] / 16
    assert blocks == 123


def test_staggered_steps_wait_at_the_end_of_an_interval_only() -> None:
    """Also steps that refresh some factors. New places of factors are copied in the first periods, and kept."""
    parameters = whole_parameters(vit_shapes(128, 1, image=64, classes=10))
    intervals = {"method": "shampoo", "statistics_interval": 4, "root_interval": 8}
    optimizer = Shampoo4(parameters.items(), foreach=True, min_quant_numel=0, refresh="staggered", **intervals)
    count_step(optimizer, parameters.values(), answer=1)
    steps = {step: count_step(optimizer, parameters.values()) for step in range(2, 25)}
    waiting = {step for step, counts in steps.items() if counts.synchronizations}
    refreshing = {step for step, counts in steps.items() if "linalg_cholesky_ex" in counts.kernels_by}
    assert waiting == set(range(4, 25, 4))
    assert len(refreshing - waiting) > len(waiting)
    assert not any(counts.copies for step, counts in steps.items() if step > 16)


@pytest.mark.parametrize("world_size", slow_except([8], SOAP_BOUNDS))
def test_steps_of_soap(world_size: int) -> None:
    """An ordinary one waits for nothing and copies nothing; a refresh reads back a number for each order of factors."""
    counted = count_soap_of_vit_b(world_size)
    steps = counted.ordinary, counted.refresh
    for step, kernels, most in zip(steps, SOAP_BOUNDS[world_size], SOAP_BYTES[world_size], strict=True):
        moved = step.moved * world_size / VIT_B_NUMEL
        print(f"{world_size} ranks: {step.kernels} kernels, {step.operators} operators, {moved:.0f} bytes a parameter")
        assert kernels / 2 < step.kernels <= kernels, step.kernels_by.most_common(12)
        assert most / 2 < moved <= most, step.moved_by.most_common(12)
        assert step.copies == 0
    assert counted.ordinary.synchronizations == 0, counted.ordinary.synchronizations_by
    assert counted.refresh.synchronizations <= 5, counted.refresh.synchronizations_by
    assert counted.refresh.kernels_by["linalg_cholesky_ex"] > 0 == counted.refresh.kernels_by["linalg_qr"]
    if world_size > 1:
        assert counted.ordinary.host_collectives == counted.refresh.host_collectives == AGREEMENTS
        assert counted.ordinary.collectives == counted.refresh.collectives == {"alltoall_base_": 4}, "no norms"
        estimate = estimate_memory(VIT_B, world_size, method="soap")
        assert counted.state_bytes == {"preconditioner": estimate.preconditioner[RANK], "base": estimate.base[RANK]}
        assert counted.ordinary.sent["alltoall_base_"] == estimate.traffic[RANK] > 0


def test_vit_b_is_the_published_one() -> None:
    shapes = [torch.Size(shape) for shape in VIT_B.values()]
    assert sum(shape.numel() for shape in shapes) == VIT_B_NUMEL and len(shapes) == 200


# -- the counting itself -----------------------------------------------------------------------------------------------


def count(work: Callable[[Tensor], object], *shape: int, answer: int = 0) -> Counts:
    """Count what ``work`` asks for with a tensor of ``shape``, by default (4, 4), on the device."""
    with CountWork(answer) as counting:
        work(torch.empty(shape or (4, 4), device="meta"))
    return counting.counts


def many(count: int, *shape: int) -> list[Tensor]:
    return [torch.empty(shape or (3,), device="meta") for _ in range(count)]


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isnan().any()),
    "float": lambda x: float(x[0, 0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.empty(4, 4).copy_(x),
    "foreach copy to the host": lambda x: torch._foreach_copy_([torch.empty(4, 4)], [x]),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0].sum(),
    "mask of rows": lambda x: x[:, x[0] > 0] * 2,
    "write by a mask": lambda x: x.__setitem__(x > 0, x[0, 0]),
    "masked select": lambda x: torch.masked_select(x, x > 0),
    "eigh": lambda x: torch.linalg.eigh(x),
    "cholesky": lambda x: torch.linalg.cholesky(x),
}
NOT_WAITING: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: x.mul_(2).add(1).sqrt() @ x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "qr": lambda x: torch.linalg.qr(x),
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(x),
    "copy to the host in the background": lambda x: torch.empty(4, 4).copy_(x, non_blocking=True),
    "a number of the host": lambda x: x + torch.tensor(2.0).item(),
    "equal on the host": lambda x: torch.equal(torch.ones(2), torch.ones(2)),
}
COPYING: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda x: torch.tensor([1, 2], device="meta"),
    "tensor of a number": lambda x: torch.tensor(1.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device="meta"),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "to": lambda x: torch.ones(3).to("meta"),
    "to in the background": lambda x: torch.ones(3).to("meta", non_blocking=True),
    "copy": lambda x: x.copy_(torch.ones(4, 4)),
    "foreach copy": lambda x: torch._foreach_copy_([x], [torch.ones(4, 4)]),
    "index by a list": lambda x: x[[0, 2]],
    "index by a tensor of the host": lambda x: x[torch.tensor([0, 2])],
}
NOT_COPYING: dict[str, Callable[[Tensor], object]] = {
    "factories": lambda x: (torch.zeros(3, device="meta"), torch.arange(4, device="meta"), x.new_full((2,), 3.0)),
    "a number": lambda x: x * 2.0 + torch.tensor(3.0),
    "slices": lambda x: x[1:, ::2].fill_(0.0),
    "index by a tensor": lambda x: x[torch.arange(2, device="meta")],
    "another type": lambda x: x.to(torch.float64).to(x.device),
    "a tensor of it": lambda x: torch.as_tensor(x),
    "tensor on the host": lambda x: torch.tensor([1, 2]) + 1,
}
# Kernels of the operators that PyTorch does not launch one for.
KERNELS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "views": (lambda x: x.view(-1)[2:8].unflatten(0, (2, 3)).mT.unsqueeze(0).unbind(), 0),
    "allocations": (lambda x: (torch.empty_like(x), x.new_empty(3)), 0),
    "nothing": (lambda x: x[:0] * 2, 0),
    "the host's": (lambda x: torch.ones(4).mul_(2).sum(), 0),
    "two": (lambda x: x.mul_(2).add(1), 2),
    "reshape of a view": (lambda x: x.reshape(-1), 0),
    "reshape that copies": (lambda x: x.mT.reshape(-1), 1),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), 1),
    "norm in another type": (lambda x: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64), 2),
    "200 in place": (lambda x: torch._foreach_mul_(many(200), 2.0), 2),
    "200 of two lists": (lambda x: torch._foreach_add_(many(200), many(200)), 4),
    "200 of three lists": (lambda x: torch._foreach_add(many(200), many(200)), 5),
    "200 copies": (lambda x: torch._foreach_copy_(many(200), many(200)), 4),
    "copies to another type": (lambda x: torch._foreach_copy_(many(2), [t.bfloat16() for t in many(2)]), 2 + 1),
    "copies between other strides": (lambda x: torch._foreach_copy_(many(9, 2, 3), [t.mT for t in many(9, 3, 2)]), 9),
    "copies of parts of rows": (lambda x: torch._foreach_copy_([x[:, :2], x[:, 2:]], [x[:, 2:], x[:, :2]]), 2),
    "large ones": (lambda x: torch._foreach_mul_(many(2, 2**24), 2.0), 2),
}
# Bytes that kernels read and write, of a float32 tensor (4, 4) or others.
BYTES: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "views": (lambda x: x.mT[:2], 0),
    "one result": (lambda x: x * 2, 64 + 64),
    "in place": (lambda x: x.mul_(2), 64 + 64),
    "into another": (lambda x: torch.mul(x, 2.0, out=torch.empty_like(x)), 64 + 64),
    "an expanded row": (lambda x: x + x[:1].expand(4, 4), 64 + 16 + 64),
    "two in place": (lambda x: torch._foreach_mul_([x, x[:2]], 2.0), 64 + 32 + 64 + 32),
    "another type": (lambda x: x.to(torch.bfloat16), 64 + 32),
    "some rows": (lambda x: x.index_select(0, torch.empty(2, dtype=torch.int64, device="meta")), 16 + 32 + 32),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_counted(name: str) -> None:
    assert count(WAITING[name]).synchronizations == 1


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_wait_is_not(name: str) -> None:
    assert count(NOT_WAITING[name]).synchronizations == 0


@pytest.mark.parametrize("name", COPYING)
def test_copies_from_the_host_are_counted(name: str) -> None:
    assert count(COPYING[name]).copies == 1


@pytest.mark.parametrize("name", NOT_COPYING)
def test_what_is_made_on_the_device_is_not(name: str) -> None:
    assert count(NOT_COPYING[name]).copies == 0


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_counted(name: str) -> None:
    work, expected = KERNELS[name]
    counts = count(work)
    assert counts.kernels == expected, counts.kernels_by


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_counted(name: str) -> None:
    work, expected = BYTES[name]
    counts = count(work)
    assert counts.moved == expected, counts.moved_by


def test_launches_end_with_tensors_or_with_blocks() -> None:
    assert [launches([1] * size, 1) for size in (0, 1, 110, 111, 220, 221)] == [0, 1, 1, 2, 2, 3]
    assert [launches([1] * 200, lists) for lists in (1, 2, 3, 4, 5)] == [2, 4, 5, 6, 7]
    assert [launches([blocks * 2**16], 2) for blocks in (1, 320, 321, 640, 641)] == [1, 1, 2, 2, 3]
    assert launches([0, 1, 0], 1) == 1


def test_numbers_are_the_answer_that_is_wished_for() -> None:
    answers: list[object] = []
    for answer in (0, 1):
        count(
            lambda x: answers.extend([x.sum().item(), bool(x.any()), x[0].tolist(), torch.equal(x, x)]), answer=answer
        )
    assert answers == [0.0, False, [0.0] * 4, False, 1.0, True, [1.0] * 4, True]


def test_a_step_that_waits_and_copies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: a product in the middle of a step that looks at its numbers."""
    parameters = whole_parameters(vit_shapes(64, 1, image=32, classes=10))
    intervals = {"statistics_interval": 1, "root_interval": 1}
    optimizer = Shampoo4(parameters.items(), foreach=True, method="shampoo", **intervals)
    count_step(optimizer, parameters.values(), answer=1)
    sound = count_step(optimizer, parameters.values())
    bmm = torch.bmm

    def faulty(left: Tensor, right: Tensor) -> Tensor:
        product = bmm(left, right)
        return product.nan_to_num(0.0) * torch.tensor([1.0], device="meta") if product.sum().item() == 0.0 else product

    monkeypatch.setattr(torch, "bmm", faulty)
    found = count_step(optimizer, parameters.values())
    assert found.synchronizations - sound.synchronizations == sound.kernels_by["bmm"] > 0
    assert found.copies - sound.copies == sound.kernels_by["bmm"]
