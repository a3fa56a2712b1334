"""One contract for every host: with equal gradients, the same training as one process, and a share of the state.

Slow: test_golden.py proves the same for some of the cases in the quick tier.

Gradients are replayed: every host is given its shards of the same global gradients, so that nothing but the optimizer
is compared, and parameters must agree bitwise. All processes compute with one thread: a product of another number of
threads may be rounded otherwise.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import CASES, make_optimizer, train_case, train_case_as_zero_does
from support.marks import slow_except
from torch import Tensor

from sharded_shampoo4.planning import copies

Found = tuple[dict[str, Tensor], dict[str, int]]  # the whole parameters, and a rank's state bytes


def run_case(host: str, name: str) -> Found:
    model, optimizer = train_case(host, name)
    return hosts.full_parameters(model, host), optimizer.state_bytes()


def run_zero_case(host: str, name: str) -> Found:
    engine, optimizer = train_case(host, name)
    found = zero.full_parameters(engine), optimizer.state_bytes()
    engine.destroy()
    return found


def run_case_as_zero_does(name: str) -> Found:
    masters, optimizer = train_case_as_zero_does(name)
    dtypes = {key: parameter.dtype for key, parameter in hosts.make_model(CASES[name][0]).named_parameters()}
    return {key: p.detach().to(dtypes[key]) for key, p in masters.named_parameters()}, optimizer.state_bytes()


def run_all(rank: int, ran: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    return {(host, name): run_case(host, name) for host in ran for name in CASES}


def run_all_of_zero(rank: int) -> dict[tuple[str, str], Any]:
    zero.prepare()
    return {(host, name): run_zero_case(host, name) for host in zero.HOSTS for name in CASES}


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    with hosts.one_thread():
        return {name: run_case("none", name) for name in CASES}


@pytest.fixture(scope="module")
def alone_as_zero() -> dict[str, Found]:
    with hosts.one_thread():
        return {name: run_case_as_zero_does(name) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])  # 3: test_golden.py
def test_the_same_training_everywhere(world_size: int, alone: dict[str, Any]) -> None:
    check_all(hosts.run_ranks(world_size, run_all, hosts.HOSTS), alone)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_training_under_zero(world_size: int, alone_as_zero: dict[str, Any]) -> None:
    check_all(hosts.run_ranks(world_size, run_all_of_zero), alone_as_zero)


BY_ROWS = ("mlp, blocks, soap", "mlp, blocks, bfloat16 on the way", "vit, blocks, remainder", "bf16")


def run_by_rows(rank: int) -> dict[tuple[str, str], Any]:
    """All copies go by an index of rows, as those of many small pieces do."""
    with mock.patch.multiple(copies, SHORTEST_ROW=1, FEW_COPIES=-1):
        return {(host, name): run_case(host, name) for host in hosts.HOSTS for name in BY_ROWS}


def test_the_same_training_where_copies_go_by_rows() -> None:
    with hosts.one_thread():
        alone = {name: run_case("none", name) for name in BY_ROWS}
    check_all(hosts.run_ranks(4, run_by_rows), alone)


def check_all(results: list[dict[tuple[str, str], Any]], alone: dict[str, Any]) -> None:
    """Every rank has the same weights as one process, and a share of the factors."""
    world_size = len(results)
    for (host, name), (parameters, _) in results[0].items():
        expected, whole = alone[name]
        for rank, result in enumerate(results):
            for key, value in result[host, name][0].items():
                assert torch.equal(value, expected[key]), (host, name, rank, key, (value - expected[key]).abs().max())
        held = [result[host, name][1]["preconditioner"] for result in results]
        assert sum(held) == whole["preconditioner"], (host, name, held)
        if "blocks" in name:
            assert max(held) < 1.6 * whole["preconditioner"] / world_size, (host, name, held)
        assert parameters


def train_for_real(host: str, steps: int = 6) -> dict[str, Tensor]:
    """Backward passes on the same two batches on every rank, added up, clipped; 32 bits, which amplify no rounding."""
    model = hosts.wrap(hosts.make_model("mlp"), host)
    optimizer = make_optimizer(model, host, {"bits": 32, "max_preconditioner_dim": 30})
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            hosts.train_step(model, hosts.make_batch("mlp", seed=2 * step + part))
        if host == "fsdp1":
            model.clip_grad_norm_(0.5)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return hosts.full_parameters(model, host)


def train_all_for_real(rank: int) -> dict[str, dict[str, Tensor]]:
    return {host: train_for_real(host) for host in hosts.HOSTS}


@pytest.mark.parametrize("world_size", slow_except([2], [2, 3]))
def test_accumulation_and_clipping(world_size: int) -> None:
    """Equal up to rounding: hosts average gradients, and add up their norm, in another order than one process."""
    expected = train_for_real("none")
    for result in hosts.run_ranks(world_size, train_all_for_real):
        for host, found in result.items():
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=f"{host}: {name}")
