"""health(): what it says of factors, in one process and on many ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.training import Training

from sharded_shampoo4 import Shampoo4

METHODS: dict[str, dict[str, Any]] = {"shampoo": {"method": "shampoo"}, "soap": {"method": "soap", "bits": 4}}
HOSTS = ("ddp", "fsdp1", "fsdp2", "zero1", "zero3")


def one_matrix(**options: Any) -> tuple[torch.nn.Parameter, Shampoo4]:
    parameter = torch.nn.Parameter(torch.zeros(70, 70))
    rule = {} if options.get("method") == "soap" else {"method": "shampoo", "root_interval": 2}
    options = {"statistics_interval": 1, **rule, **options}
    return parameter, Shampoo4([("weight", parameter)], **options)


def test_a_fresh_factor_and_one_that_has_learnt() -> None:
    parameter, optimizer = one_matrix()
    assert optimizer.health() == {}
    torch.manual_seed(0)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0, 0] = 1e-30
    optimizer.step()
    for _ in range(4):
        parameter.grad = torch.randn(70, 70)
        optimizer.step()
        told = optimizer.health()["weight"]
        # 4-bit codes leave a basis some percent from orthogonal, and the rectification takes most of it away.
        assert 0.02 < told["orthogonality_error"] < 0.5 and told["rectified_error"] < 0.3 * told["orthogonality_error"]
        assert told["smallest_eigenvalue"] < told["largest_eigenvalue"] and told["failures"] == 0
        assert told["bytes"] == optimizer.state_bytes()["preconditioner"]
    # Statistics of white noise: 70 (1 - 0.95^4), give or take.
    assert 5 < told["largest_eigenvalue"] < 60


@pytest.mark.parametrize("options", [{"bits": 32}, {"quantize": "preconditioner"}])
def test_factors_without_a_basis(options: dict[str, Any]) -> None:
    parameter, optimizer = one_matrix(**options)
    parameter.grad = torch.eye(70)
    optimizer.step()
    told = optimizer.health()["weight"]
    assert math.isnan(told["orthogonality_error"]) and math.isnan(told["rectified_error"])
    # 0.95 times 1e-6 I, and 0.05 times I.
    assert told["smallest_eigenvalue"] == pytest.approx(0.05, rel=1e-3)
    assert told["largest_eigenvalue"] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_eigenbases_of_soap(bits: int) -> None:
    """Also of the first step: they need no root. In 8 bits they are not rectified."""
    parameter, optimizer = one_matrix(method="soap", bits=bits)
    for step in range(1, 5):
        parameter.grad = torch.randn(70, 70, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        told = optimizer.health()["weight"]
        stored, rectified = told["orthogonality_error"], told["rectified_error"]
        assert 0.02 < stored < 0.5 and rectified < 0.3 * stored if bits == 4 else 1e-4 < stored == rectified < 0.02
        assert 0 <= told["smallest_eigenvalue"] < told["largest_eigenvalue"] and told["failures"] == 0
        assert told["bytes"] == optimizer.state_bytes()["preconditioner"]
        assert told["steps"] == told["roots"] == step


@pytest.mark.parametrize("method", METHODS)
def test_failures_are_counted_and_forgotten(method: str) -> None:
    parameter, optimizer = one_matrix(**METHODS[method])
    for step, failures in enumerate([0, 1, 2, 0]):
        parameter.grad = torch.randn(70, 70)
        if failures:
            parameter.grad[3, 4] = float("nan")
        optimizer.step()
        assert optimizer.health()["weight"]["failures"] == failures, step
        with torch.no_grad():
            parameter.zero_()


def on_ranks(rank: int) -> dict[str, Any]:
    zero.prepare()
    told = {}
    for method, options in METHODS.items():
        for host in HOSTS:
            training = Training(host, **options)
            training.train(range(5))
            told[method, host] = training.optimizer.health()
            training.end()
    return told


def test_all_ranks_tell_what_one_process_tells() -> None:
    expected = {}
    with hosts.one_thread():
        for method, options in METHODS.items():
            training = Training("none", **options)
            training.train(range(5))
            expected[method] = training.optimizer.health()
            assert len(expected[method]) == 3
    for rank in hosts.run_ranks(2, on_ranks):
        for (method, host), told in rank.items():
            assert told == expected[method], (method, host)
