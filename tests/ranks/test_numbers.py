"""Numbers gone wrong: no poisoned factor, no rank that hangs, and one error on all ranks if it does not get better."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import make_optimizer
from support.marks import slow_except
from torch import Tensor

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.grafting import block_norms
from sharded_shampoo4.numerics import linalg
from sharded_shampoo4.numerics.preconditioner import Preconditioner

HOSTS = ("ddp", "fsdp1", "fsdp2", "hsdp")
OPTIONS = {"max_preconditioner_dim": 30, "min_quant_numel": 0, "lr": 0.0, "weight_decay": 0.0, "max_failures": 3}


def finite_factors(preconditioner: Preconditioner) -> bool:
    tensors = [
        tensor for pool in preconditioner.pools for tensor in pool.tensors.values() if tensor.is_floating_point()
    ]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def run(host: str, spoil: Callable[[int, dict[str, Any]], None], steps: int = 12) -> dict[str, Any]:
    """Replay gradients that ``spoil`` has spoilt; until all is done or an error is raised."""
    model = hosts.wrap(hosts.make_model("mlp"), host)
    optimizer = make_optimizer(model, host, OPTIONS)
    told: dict[str, Any] = {"steps": 0, "error": None}
    for step in range(steps):
        gradients = hosts.make_gradients("mlp", step)
        spoil(step, gradients)
        hosts.set_gradients(model, host, gradients)
        try:
            optimizer.step()
        except RuntimeError as error:
            told["error"] = str(error)
            break
        told["steps"] += 1
        told["health"] = optimizer.health()
        told["finite"] = finite_factors(optimizer._session.last.preconditioner)
    return told


def poison(*steps: int) -> Callable[[int, dict[str, Any]], None]:
    """NaN in one element, and infinity in another parameter's, at these steps."""

    def spoil(step: int, gradients: dict[str, Any]) -> None:
        if step in steps:
            gradients["middle.weight"][7, 3] = torch.nan
            gradients["stem.weight"][1, 1] = -torch.inf

    return spoil


def on_ranks(rank: int) -> dict[tuple[str, str], Any]:
    told = {}
    for host in HOSTS:
        told[host, "now and then"] = run(host, poison(3, 5, 9))
        told[host, "for good"] = run(host, poison(*range(4, 12)))
        told[host, "nothing but zeros"] = run(host, lambda _, gradients: [g.zero_() for g in gradients.values()])
        whole = linalg.qr
        if rank == 1:  # one rank's library fails
            linalg.qr = lambda matrices, start: torch.full_like(matrices, torch.nan)
        told[host, "one rank's QR"] = run(host, lambda *_: None)
        linalg.qr = whole
    return told


def on_zero(rank: int) -> dict[tuple[str, str], Any]:
    zero.prepare()
    told = {}
    for host in zero.HOSTS:
        whole = linalg.qr
        for case, spoil in (("for good", poison(*range(4, 12))), ("one rank's QR", lambda *_: None)):
            if rank == 1 and case != "for good":
                linalg.qr = lambda matrices, start: torch.full_like(matrices, torch.nan)
            told[host, case] = run_engine(host, spoil)
            linalg.qr = whole
    return told


def run_engine(host: str, spoil: Callable[[int, dict[str, Any]], None], steps: int = 12) -> dict[str, Any]:
    """As :func:`run`, by DeepSpeed."""
    model = hosts.make_model("mlp")
    optimizer = make_optimizer(model, "none", OPTIONS)
    engine = zero.start(zero.Replay(model), zero.configuration(host), optimizer)
    told: dict[str, Any] = {"steps": 0, "error": None}
    for step in range(steps):
        gradients = hosts.make_gradients("mlp", step)
        spoil(step, gradients)
        try:
            zero.step(engine, gradients)
        except RuntimeError as error:
            told["error"] = str(error)
            break
        told["steps"] += 1
    told["finite"] = all(finite_factors(binding.preconditioner) for binding in optimizer._session.all())
    told["skipped"] = engine.skipped_steps
    engine.destroy()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_deepspeed_skips_gradients_gone_wrong_and_ranks_raise_together(world_size: int) -> None:
    """Stages 1 to 3 look for such gradients themselves, in any precision; stage 0 in float16 alone."""
    ranks = hosts.run_ranks(world_size, on_zero)
    for host, case in ranks[0]:
        told = [rank[host, case] for rank in ranks]
        assert all(each["finite"] for each in told), (host, case)
        assert len({each["steps"] for each in told}) == 1, (host, case)
        if case == "for good" and host != "zero0":
            assert all(not each["error"] and (each["steps"], each["skipped"]) == (12, 8) for each in told), host
        else:
            errors = {re.sub(r"^rank \d+: ", "", each["error"]) for each in told}
            assert len(errors) == 1 and "failed to update 3 times in a row (max_failures=3)" in errors.pop()


@pytest.mark.parametrize("world_size", slow_except([2], [2, 3]))
def test_every_rank_goes_on_or_raises_the_same(world_size: int) -> None:
    ranks = hosts.run_ranks(world_size, on_ranks)
    for case in ranks[0]:
        what = case[1]
        errors = {re.sub(r"^rank \d+: ", "", rank[case]["error"]) for rank in ranks if rank[case]["error"]}
        assert all(rank[case].get("finite", True) for rank in ranks), case
        assert len({rank[case]["steps"] for rank in ranks}) == 1, case
        if what in ("now and then", "nothing but zeros"):
            assert not errors and ranks[0][case]["steps"] == 12, (case, errors)
            worst = max(told["failures"] for told in ranks[0][case]["health"].values())
            assert worst == 0, case
        else:
            assert all(rank[case]["error"] for rank in ranks), case
            assert "failed to update 3 times in a row (max_failures=3)" in ranks[0][case]["error"]
            assert len(errors) == 1, errors


def gradients_of_rank_one() -> Callable[[int], Tensor]:
    return lambda step: torch.outer(torch.linspace(1, 2, 70) ** (step % 3), torch.linspace(-1, 1, 66))


def exploding_condition() -> Callable[[int], Tensor]:
    basis = torch.linalg.qr(torch.randn(70, 66, generator=torch.Generator().manual_seed(0)))[0]
    return lambda step: basis * torch.logspace(-min(step / 10, 15), 0, 66)


def wandering_scales() -> Callable[[int], Tensor]:
    noise = torch.randn(70, 66, generator=torch.Generator().manual_seed(0))
    return lambda step: noise * 10.0 ** (((7 * step) % 37) - 20)


@pytest.mark.parametrize("make", [gradients_of_rank_one, exploding_condition, wandering_scales])
@pytest.mark.parametrize("bits", [4, 32])
def test_hundreds_of_odd_gradients(make: Callable[[], Callable[[int], Tensor]], bits: int) -> None:
    gradient_at = make()
    parameter = torch.nn.Parameter(torch.zeros(70, 66))
    intervals = {"statistics_interval": 1, "root_interval": 3}
    optimizer = Shampoo4([("odd", parameter)], base="sgd", lr=0.0, method="shampoo", bits=bits, **intervals)
    for step in range(300):
        gradient = gradient_at(step)
        parameter.grad = gradient.clone()
        optimizer.step()
        assert parameter.grad.isfinite().all(), step
        # Less where the direction is so small that the 1e-12 in the grafting's denominator is felt.
        assert parameter.grad.double().norm() <= gradient.double().norm() * 1.0001, step
    assert finite_factors(optimizer._session.last.preconditioner)
    assert optimizer.health()["odd"]["failures"] == 0


@pytest.mark.parametrize("bits", [4, 32])
def test_squares_that_leave_the_range_are_failures_and_the_factor_stays(bits: int) -> None:
    """1e20 squared is no float32: statistics cannot be stored."""
    parameter = torch.nn.Parameter(torch.zeros(70, 66))
    intervals = {"statistics_interval": 1, "root_interval": 1}
    optimizer = Shampoo4([("huge", parameter)], base="sgd", lr=0.0, method="shampoo", bits=bits, **intervals)
    for scale, failures in ((1.0, 0), (1e20, 1), (1e20, 2), (1.0, 0), (1e-20, 0)):
        parameter.grad = scale * torch.randn(70, 66)
        optimizer.step()
        assert parameter.grad.isfinite().all() and finite_factors(optimizer._session.last.preconditioner)
        assert optimizer.health()["huge"]["failures"] == failures, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_blocks_of_any_size(dtype: torch.dtype) -> None:
    """Squares of the smallest and the largest here are no float32; each block is as if it were alone."""
    torch.manual_seed(0)
    blocks = torch.randn(8, 30, 70, dtype=dtype)
    for block, scale in zip(blocks, (1.0, 1e-25, 1e-19, 1e-14, 0.0, 1e15, 1e19, 1e36), strict=True):
        block.mul_(scale)
    blocks[0, :15] *= 1e-22  # rows that do not count
    norms = block_norms(blocks)
    torch.testing.assert_close(norms, blocks.double().flatten(1).norm(dim=1), rtol=1e-7, atol=0.0)
    assert all(torch.equal(block_norms(block[None])[0], norm) for block, norm in zip(blocks, norms, strict=True))
    blocks[2, 3, 4], blocks[3, 5, 6] = torch.nan, torch.inf
    assert block_norms(blocks)[2].isnan() and block_norms(blocks)[3].isinf()
