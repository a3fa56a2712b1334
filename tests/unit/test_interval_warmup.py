"""Preconditioning begins early, says that it has begun, and is missed where it cannot begin."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.numerics.matrix import Matrix
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.presets import apply_preset

SHAMPOO: dict[str, Any] = {"method": "shampoo"}


def train(optimizer: Shampoo4, parameter: nn.Parameter, steps: int) -> list[int]:
    """The steps whose directions were not the gradients."""
    directed = []
    for step in range(1, steps + 1):
        parameter.grad = torch.randn(parameter.shape)
        gradient = parameter.grad.clone()
        optimizer.step()
        if not torch.equal(parameter.grad, gradient):
            directed.append(step)
    return directed


def due(steps: int, **options: Any) -> tuple[list[int], list[int]]:
    """The steps with statistics and with roots of one matrix."""
    matrix = Matrix(
        "", (8, 8), PreconditionerOptions.of_call(apply_preset({**SHAMPOO, **options})), torch.device("cpu")
    )
    statistics, roots = [], []
    for step in range(1, steps + 1):
        matrix.advance()
        (block,) = matrix.blocks
        if matrix.statistics_due(block, 0):
            statistics.append(step)
        if matrix.root_due(block, 0):
            roots.append(step)
        assert matrix.due.check == (step in statistics or step in roots)
        assert matrix.rooted == bool(roots) and matrix.roots == len(roots)
    return statistics, roots


def test_intervals_grow_to_what_was_asked_for() -> None:
    statistics, roots = due(1200)
    assert roots == [10, 20, 40, 80, 160, 320, 500, 1000]
    assert statistics[:12] == [*range(5, 41, 5), 50, 60, 70, 80]
    assert [step for step in statistics if step > 400] == list(range(500, 1201, 100))
    assert set(roots) <= set(statistics), "roots are of fresh statistics"


@pytest.mark.parametrize(("every", "root_every"), [(1, 1), (2, 4), (4, 8), (3, 10)])
def test_short_intervals_are_as_they_were(every: int, root_every: int) -> None:
    options = {"statistics_interval": every, "root_interval": root_every}
    assert due(60, **options) == due(60, **options, interval_warmup=False)


def test_the_papers_intervals_do_not_grow() -> None:
    options = Shampoo4.paper_settings()
    assert due(1000, **options) == (list(range(100, 1001, 100)), [500, 1000])


@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_directions_begin_at_step_ten_when_every_factor_has_seen_gradients(refresh: str) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(96, 96))
    options = {**SHAMPOO, "refresh": refresh, "max_preconditioner_dim": 32, "grafting": "none"}
    optimizer = Shampoo4([parameter], base="sgd", lr=0.0, **options)
    assert train(optimizer, parameter, 12) == [10, 11, 12]
    preconditioner = optimizer._session.last.preconditioner  # type: ignore[union-attr]
    for pool in preconditioner.pools:
        diagonals = pool.tensors["root"].diagonal(dim1=1, dim2=2)
        assert (diagonals.amin(1) < 0.9 * diagonals.amax(1)).all(), "no root is of the initial statistics"


@pytest.mark.parametrize("method", ["shampoo", "soap"])
def test_a_short_run_is_not_the_base_optimizer_alone(method: str) -> None:
    def run(rule: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(32, 32))
        optimizer = rule([parameter], lr=1e-2, weight_decay=0.0, **options)
        for _ in range(30):
            parameter.grad = torch.randn(32, 32) * torch.logspace(0, -2, 32)
            optimizer.step()
        return parameter.detach()

    assert not torch.equal(run(Shampoo4, method=method), run(torch.optim.AdamW))


def test_health_and_describe_tell_how_far_it_is() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo4([("w", parameter)], **SHAMPOO)
    assert "begins with step 10, after 0 so far" in optimizer.describe()
    train(optimizer, parameter, 9)
    assert optimizer.health()["w"]["steps"] == 9 and optimizer.health()["w"]["roots"] == 0
    assert "begins with step 10, after 9 so far" in optimizer.describe()
    train(optimizer, parameter, 11)
    assert optimizer.health()["w"]["steps"] == 20 and optimizer.health()["w"]["roots"] == 2
    assert "computed 2 times in 20 steps" in optimizer.describe()
    state = optimizer.state_dict()
    resumed = Shampoo4([("w", parameter)], **SHAMPOO)
    resumed.load_state_dict(state)
    train(resumed, parameter, 1)
    assert resumed.health()["w"]["steps"] == 21 and resumed.health()["w"]["roots"] == 2


def test_the_beginning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo4([("w", parameter)], **SHAMPOO)
    with caplog.at_level(logging.INFO, logger="sharded_shampoo4"):
        train(optimizer, parameter, 25)
    lines = [record.getMessage() for record in caplog.records if "Preconditioning begins" in record.getMessage()]
    assert lines == ["Preconditioning begins with step 10 of w"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (100, 500)),
        ({"total_steps": 300}, (10, 50)),
        ({"total_steps": 20_000}, (40, 200)),
        ({"total_steps": 10**6}, (100, 500)),
        ({"total_steps": "300"}, (10, 50)),
        ({"total_steps": 300, "root_interval": 20}, (10, 20)),
        ({"total_steps": 300, "statistics_interval": 2}, (2, 50)),
        ({"root_interval": 40}, (40, 40)),
        ({"statistics_interval": 7, "root_interval": 21}, (7, 21)),
    ],
)
def test_intervals_follow_from_the_length_unless_they_are_given(given: dict[str, Any], expected: Any) -> None:
    group = Shampoo4([nn.Parameter(torch.zeros(8, 8))], **SHAMPOO, **given).param_groups[0]
    assert (group["statistics_interval"], group["root_interval"]) == expected
    estimate_memory({"w": (8, 8)}, 1, **SHAMPOO, **given)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 5), ({"total_steps": 20_000}, 5), ({"statistics_interval": 2}, 2)]
)
def test_soap_s_interval_does_not_follow_from_the_length(given: dict[str, Any], expected: int) -> None:
    group = Shampoo4([nn.Parameter(torch.zeros(8, 8))], **given).param_groups[0]
    assert group["method"] == "soap" and group["statistics_interval"] == expected


@pytest.mark.parametrize("total_steps", [0, -1, 1.5, "many", True])
def test_a_length_must_be_a_number_of_steps(total_steps: Any) -> None:
    with pytest.raises(ValueError, match="total_steps must be an integer of at least 1"):
        Shampoo4([nn.Parameter(torch.zeros(8, 8))], total_steps=total_steps)
    with pytest.raises(TypeError, match="total_steps is of the whole optimizer"):
        Shampoo4([{"params": [nn.Parameter(torch.zeros(8, 8))], "total_steps": 10}])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_steps": 300, "root_interval": 500, "interval_warmup": False}, "in no step"),
        ({"total_steps": 600, "root_interval": 500, "interval_warmup": False}, "only from step 500 on"),
        ({"total_steps": 8}, "in no step"),
        ({"total_steps": 1000, "root_interval": 500, "interval_warmup": False}, None),
        ({"total_steps": 300}, None),
        ({}, None),
    ],
)
def test_a_run_that_is_known_to_be_too_short_is_warned_about(options: dict[str, Any], said: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Shampoo4([nn.Parameter(torch.zeros(8, 8))], **SHAMPOO, **options)
    found = [str(warning.message) for warning in caught if "this run has" in str(warning.message)]
    assert (said is None and not found) or (said is not None and len(found) == 1 and said in found[0]), found
    assert not found or "Give a smaller root_interval" in found[0]  # total_steps is given


def test_a_step_without_gradients_says_why() -> None:
    model = nn.Linear(4, 4)
    optimizer = Shampoo4(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"none of the 2 parameters in this step has a gradient \(0 are frozen; the"):
        optimizer.step()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"fully_shard\(\) and other wrappers replace"):
        optimizer.step()


def test_states_of_before_keep_their_intervals() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo4([parameter])
    state = optimizer.state_dict()
    del state["param_groups"][0]["interval_warmup"]
    optimizer.load_state_dict(state)
    assert not PreconditionerOptions.of_group(optimizer.param_groups[0]).interval_warmup
