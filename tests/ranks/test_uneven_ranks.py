"""Ranks that do not do the same: some run out of inputs, make another call, or make none."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import worlds as hosts
from support.contract import PATIENCE, SMALL_BLOCKS, make_optimizer
from support.training import Training
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sharded_shampoo4 import checkpoint


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def join_models(rank: int) -> dict[str, Any]:
    """Rank 1 has two batches less."""
    told: dict[str, Any] = {}
    for case in ("even", "both", "thrown", "optimizer only", "model only"):
        group = dist.new_group(timeout=PATIENCE)
        model: nn.Module = hosts.make_model("mlp")
        if case != "optimizer only":
            model = DistributedDataParallel(model, process_group=group)
        optimizer = make_optimizer(model, "none", {**SMALL_BLOCKS, "process_group": group})
        joinables: list[Any] = {"optimizer only": [optimizer], "model only": [model]}.get(case, [model, optimizer])
        batches = 4 if case == "even" or rank == 0 else 2

        def train() -> None:
            with Join(joinables, throw_on_early_termination=case == "thrown"):  # noqa: B023
                for step in range(batches):  # noqa: B023
                    optimizer.zero_grad()  # noqa: B023
                    hosts.train_step(model, hosts.make_batch("mlp", step))  # noqa: B023
                    optimizer.step()  # noqa: B023

        begun = time.monotonic()
        told[case] = hosts.said(train), time.monotonic() - begun
        told[case, "trained"] = hosts.full_parameters(model, "none")
    return told


def test_uneven_inputs_are_refused_on_every_rank() -> None:
    first, second = hosts.run_ranks(2, join_models)
    assert first["even"][0] == second["even"][0] == "nothing was raised"
    assert_equal(first["even", "trained"], second["even", "trained"])
    for case in ("both", "optimizer only"):
        for told in (first, second):
            assert "this rank has run out of inputs" in told[case][0], (case, told[case])
            assert "throw_on_early_termination=True" in told[case][0] and told[case][1] < PATIENCE.seconds
        assert first[case][0].startswith("RuntimeError: rank 1: ")
        assert_equal(first[case, "trained"], second[case, "trained"])
    assert "exhausted" in first["thrown"][0] and "exhausted" in second["thrown"][0]
    assert "rank 0 has waited in vain for the other ranks of its group of 2 in step()" in first["model only"][0]
    assert "uneven inputs" in first["model only"][0] and "throw_on_early_termination=True" in first["model only"][0]
    assert second["model only"][0].startswith("RuntimeError")


def astray(rank: int) -> dict[str, Any]:
    """Ranks in different calls, and one that makes no call at all."""
    told: dict[str, Any] = {}
    for case in ("consolidating", "saving", "health", "another optimizer"):
        group = dist.new_group(timeout=PATIENCE)
        first, second = (Training("none", process_group=group) for _ in range(2))
        first.train(range(2))
        second.train(range(2))

        def diverge() -> None:
            if rank == 0:
                first.train(range(2, 3))  # noqa: B023
            elif case == "consolidating":  # noqa: B023
                first.optimizer.consolidate_state_dict()  # noqa: B023
            elif case == "saving":  # noqa: B023
                first.save(tempfile.mkdtemp())  # noqa: B023
            elif case == "health":  # noqa: B023
                first.optimizer.health()  # noqa: B023
            else:
                second.train(range(2, 3))  # noqa: B023

        told[case] = hosts.said(diverge)
    group = dist.new_group(timeout=PATIENCE)
    dist.barrier()
    told["one never steps"] = hosts.said(lambda: rank or Training("none", process_group=group).train(range(1)))
    return told


def test_ranks_in_different_calls_raise_and_say_which() -> None:
    first, second = hosts.run_ranks(2, astray)
    for told in (first, second):
        for case, call in (
            ("consolidating", "consolidate_state_dict()"),
            ("saving", "checkpoint.save()"),
            ("health", "health()"),
        ):
            assert f"different calls of Shampoo4: rank 0: step(), rank 1: {call}; every rank" in told[case], told[case]
        assert re.search(
            r"rank 0: step\(\) of optimizer \d, rank 1: step\(\) of optimizer \d", told["another optimizer"]
        )
    assert "rank 0 has waited in vain" in first["one never steps"]
    assert "a model that only some ranks train: " in first["one never steps"]
    assert "process_group='alone'" in first["one never steps"]


def made_again(rank: int, store: str) -> dict[str, Any]:
    """The process group is destroyed and made again between steps."""
    training = Training("none")
    training.train(range(5))
    checkpoint.async_save(training.optimizer, f"{store}-before", model=training.model).result()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    said = [hosts.said(training.optimizer.health), hosts.said(training.optimizer.consolidate_state_dict)]
    saved = checkpoint.async_save(training.optimizer, f"{store}-after", model=training.model)
    said.append(hosts.said(saved.result))
    trained = training.train(range(5, 9))
    grouped = Training("none", process_group=dist.new_group([0, 1]))
    grouped.train(range(1))
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}2", rank=rank, world_size=2)
    return {"trained": trained, "group": hosts.said(lambda: grouped.train(range(1))), "said": said}


def test_a_process_group_that_is_made_again(tmp_path: Path) -> None:
    with hosts.one_thread():
        expected = Training("none").train(range(9))
    for told in hosts.run_ranks(2, made_again, str(tmp_path / "store")):
        assert_equal(told["trained"], expected)
        assert "the group that process_group= was given was destroyed" in told["group"]
        assert told["said"] == ["nothing was raised"] * 3
