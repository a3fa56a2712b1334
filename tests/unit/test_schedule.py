"""Staggered factors: every one keeps its interval, and no step has much more to do than another."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.options import METHODS, PreconditionerOptions
from sharded_shampoo4.planning.plan import Plan, PlannedMatrix
from sharded_shampoo4.planning.schedule import stagger
from sharded_shampoo4.planning.shards import Shard
from sharded_shampoo4.planning.views import View


def of_shampoo(**options: Any) -> PreconditionerOptions:
    return PreconditionerOptions(**{"method": "shampoo", **METHODS["shampoo"], **options})


def options(every: int, root_every: int, size: int = 1024) -> PreconditionerOptions:
    intervals = {"statistics_interval": every, "root_interval": root_every}
    return of_shampoo(refresh="staggered", max_preconditioner_dim=size, **intervals)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_roots_are_in_steps_of_statistics(data: st.DataObject) -> None:
    every, times, rest = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    root_every = every * times + min(rest, every - 1)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
    for blocks in stagger([(View(shape), options(every, root_every, 4)) for shape in shapes]):
        for phase in (phase for both in blocks.values() for phase in both):
            assert 0 <= phase.statistics < every and 0 <= phase.root < root_every
            first_statistics, first_root = phase.statistics or every, phase.root or root_every
            assert first_statistics <= first_root
            if root_every % every == 0:
                assert (first_root - first_statistics) % every == 0


VIT_B = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12 + [(1000, 768)]


@pytest.mark.parametrize(("every", "root_every", "world_size", "most"), [
    (10, 10, 1, 1.02), (10, 10, 8, 1.35), (100, 500, 1, 1.2), (100, 500, 4, 3.4),
])  # fmt: skip
def test_work_is_spread_evenly(every: int, root_every: int, world_size: int, most: float) -> None:
    """Of a ViT-B over steps and, by the choice of owners, over ranks: the most that a rank has to do in a step.

    The root of a factor costs a quarter of its statistics. The greatest factor alone is half of an even share with
    intervals of 100 and 500 on one rank, and twice it on four.
    """
    given = options(every, root_every)
    phases = stagger([(View(shape), given) for shape in VIT_B])
    planned = [
        PlannedMatrix("", (m, n), (*due,), tuple(Shard(0, m * n, rank) for rank in range(world_size)), phases=due)
        for (m, n), due in zip(VIT_B, phases, strict=True)
    ]
    plan = Plan(planned, world_size)
    spent = [[0] * root_every for _ in range(world_size)]
    for (index, block), owner in zip(plan.blocks, plan.owners, strict=True):
        for order, phase in zip((block.rows, block.columns), phases[index][block], strict=True):
            for step in range(phase.statistics, root_every, every):
                spent[owner][step] += order**3
            spent[owner][phase.root] += order**3 // 4
    mean = sum(map(sum, spent)) / root_every / world_size
    assert max(map(max, spent)) <= most * mean
    assert world_size > 1 or max(spent[0]) <= 1.3 * statistics.median(spent[0]), "no stall"
    assert max(plan.loads()) <= 1.06 * sum(plan.loads()) / world_size


def test_together_and_staggered_groups() -> None:
    together = of_shampoo(statistics_interval=4, root_interval=8)
    first, second = stagger([(View((9, 9)), together), (View((9, 9)), options(4, 8))])
    assert first == {} and len(second) == 1


def test_every_factor_is_refreshed_once_an_interval_and_directions_begin_with_the_first_root() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(12, 8)) for _ in range(3)]
    optimizer = Shampoo4(
        parameters,
        method="shampoo",
        base="sgd",
        lr=0.0,
        refresh="staggered",
        statistics_interval=4,
        root_interval=8,
        grafting="none",
        min_quant_numel=1,
    )
    changed: list[list[int]] = []
    before: list[torch.Tensor] = []
    for step in range(1, 17):
        for parameter in parameters:
            parameter.grad = torch.randn(12, 8)
        gradients = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        directed = [not torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True)]
        assert directed == [step >= 8] * 3
        pools = optimizer._session.last.preconditioner.pools
        now = [row.clone() for pool in pools for row in pool.tensors["eigenvalues"]]
        if before:
            changed.append([k for k, (a, b) in enumerate(zip(now, before, strict=True)) if not torch.equal(a, b)])
        before = now
    for start in range(3, 15, 4):  # steps 5 to 8, and so on
        assert sorted(k for step in changed[start : start + 4] for k in step) == list(range(6))
    assert max(map(len, changed)) <= 3


def test_intervals_of_a_group_may_change() -> None:
    """The factors are kept, and due at new steps."""
    parameter = torch.nn.Parameter(torch.zeros(12, 8))
    intervals = {"statistics_interval": 2, "root_interval": 2}
    optimizer = Shampoo4([parameter], method="shampoo", refresh="staggered", interval_warmup=False, **intervals)
    for step in range(6):
        if step == 4:
            optimizer.param_groups[0].update(statistics_interval=7, root_interval=7)
            kept = optimizer.state_dict()["state"][0]["preconditioner"]
        parameter.grad = torch.randn(12, 8)
        optimizer.step()
        if step == 4:  # t = 5: of 7 steps, the first two have something to do
            assert torch.equal(optimizer.state_dict()["state"][0]["preconditioner"][16:], kept[16:])


@pytest.mark.parametrize("how", ["a copy", "state_dict()"])
def test_a_run_resumes_with_the_same_steps_while_a_layer_is_frozen(how: str) -> None:
    """The steps of all factors depend on what is trained, so they are others while a layer is frozen, in every run."""

    def trained(resumed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        options: dict[str, Any] = {"refresh": "staggered", "statistics_interval": 3, "interval_warmup": False}
        optimizer = Shampoo4(model.named_parameters(), **options)
        for step in range(20):
            if step in (4, 12):
                model[0].requires_grad_(step == 12)
                optimizer.zero_grad()
            if step == 7 and resumed and how == "a copy":
                model, optimizer = copy.deepcopy((model, optimizer))
            elif step == 7 and resumed:
                model, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
                optimizer = Shampoo4(model.named_parameters(), **options)
                optimizer.load_state_dict(saved)
            for parameter in model.parameters():
                gradient = torch.randn_like(parameter)
                parameter.grad = gradient if parameter.requires_grad else None
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(False), trained(True))


@pytest.mark.parametrize("name", ["refresh", "root", "scale_dtype"])
def test_unknown_values_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'other'"):
        Shampoo4([torch.nn.Parameter(torch.zeros(2, 2))], **{name: "other"})
