"""DeepSpeed's engines in all the ways that people configure them: the same weights as one process, bit by bit.

Gradients are replayed (``zero_worlds.py``) through the real engine. What every stage does with ordinary settings is in
``test_contract.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.marks import batch_of, slow_except
from support.zero_cases import CASES, Case, groups_of, make_gradients, make_model, start, train
from torch import Tensor

from sharded_shampoo4 import Shampoo4


def run_case(case: Case) -> dict[str, Any]:
    engine = start(case)
    rates = train(engine, case, range(case.steps))
    optimizer = engine.basic_optimizer
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "rates": rates,
        "parameters": zero.full_parameters(engine),
        "bytes": optimizer.state_bytes(),
        "described": optimizer.describe(),
        "skipped": engine.skipped_steps,
    }
    engine.destroy()
    return result


QUICK = (
    "four micro-batches, stage 2",
    "offloaded parameters, stage 3",
    "learning rate from a schedule, stage 1",
    "groups, stage 2",
    "round robin, stage 1",
    "small sub-groups, stage 3",
    "bf16 with gradients in float32",
    "fp16, stage 3",
    "zero.Init",
    "groups, stage 2, soap",
    "small sub-groups, stage 3, soap",
    "bf16 with gradients in float32, soap",
)  # of two ranks


def run_cases(rank: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    zero.prepare()
    zero.pretend_fp16()
    return {name: run_case(CASES[name]) for name in names}


def results(world_size: int, name: str) -> list[dict[str, Any]]:
    """What every rank found in a case; all quick cases run in one launch, all slow ones in another."""
    names = batch_of(name, QUICK if world_size == 2 else (), CASES)
    return [rank[name] for rank in hosts.run_ranks_once(world_size, run_cases, names)]


@functools.cache
def run_alone(
    kind: str, optimizer_by: str, overflow: int | None, rates: tuple[float, ...], method: str
) -> tuple[dict[str, Tensor], int]:
    """The same training in one process, on float32 copies of the weights; and the bytes of all factors."""
    case = Case("none", kind=kind, optimizer=optimizer_by, overflow=overflow, method=method)
    model = make_model(case)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    model = model.float()
    named = list(model.named_parameters())
    optimizer = Shampoo4(groups_of(named) if case.optimizer == "groups" else named, **case.options)
    for step, rate in enumerate(rates):
        if step == case.overflow:
            continue
        gradients = make_gradients(case, step)
        for name, parameter in named:
            gradient = gradients[name]
            if parameter.requires_grad:  # DeepSpeed makes zeros of a missing gradient
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.float()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {n: p.detach().to(dtypes[n]) for n, p in named}, optimizer.state_bytes()["preconditioner"]


@pytest.mark.parametrize("world_size", slow_except([2], [2, 3]))
@pytest.mark.parametrize("name", slow_except(QUICK, CASES))
def test_the_weights_are_those_of_one_process(name: str, world_size: int) -> None:
    case = CASES[name]
    ranks = results(world_size, name)
    with hosts.one_thread():
        by = "groups" if case.optimizer == "groups" else "program"
        expected, whole = run_alone(case.kind, by, case.overflow, tuple(ranks[0]["rates"]), case.method)
    for rank in ranks:
        for key, value in rank["parameters"].items():
            assert torch.equal(value, expected[key]), (key, (value - expected[key]).abs().max())
        assert rank["skipped"] == (0 if case.overflow is None else 1)
    held = [rank["bytes"]["preconditioner"] for rank in ranks]
    assert sum(held) == whole
    assert max(held) <= 1.25 * whole / world_size, held  # small models: a few blocks for each rank
    if "scheduler" in case.config:
        assert len(set(ranks[0]["rates"])) > 5


@pytest.mark.slow
def test_the_wrappers_are_those_that_the_cases_are_for() -> None:
    def wrapper(name: str) -> str:
        return results(2, name)[0]["wrapper"]

    assert wrapper("one micro-batch, stage 0") == "Shampoo4"
    assert wrapper("bf16, stage 0") == wrapper("fp16, stage 0") == "FP16_UnfusedOptimizer"
    assert wrapper("bf16, stage 1") == wrapper("fp16, stage 2") == "DeepSpeedZeroOptimizer"
    assert wrapper("bf16 with gradients in float32") == "BF16_Optimizer"
    assert wrapper("bf16, stage 3") == wrapper("zero.Init") == "DeepSpeedZeroOptimizer_Stage3"


@pytest.mark.slow
def test_parameters_have_their_names_where_zero_knows_them() -> None:
    for name in (
        "one micro-batch, stage 1",
        "one micro-batch, stage 3",
        "zero.Init",
        "the program's optimizer, stage 2",
    ):
        assert all("middle.weight  (101, 44)  yes: 4 bits" in rank["described"] for rank in results(2, name))
    assert all("middle.weight  (101, 44)  yes: 8 bits" in rank["described"] for rank in results(2, "groups, stage 2"))
