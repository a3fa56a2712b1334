"""Whole weights that a pass without gradients leaves under FSDP: neither saved, nor used after a load, nor trained."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support.training import FIRST, Training
from support.worlds import said
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sharded_shampoo4 import Shampoo4, checkpoint

INPUTS, TARGETS = hosts.make_batch("mlp")


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    return model(INPUTS)


# -- checkpoints without the model -------------------------------------------------------------------------------------


def load_without_the_model(rank: int, folder: str) -> dict[str, list[bool]]:
    """Load under each kind of FSDP after an evaluation, and compare what the model then gives."""
    told = {}
    for host in ("fsdp2", "hsdp", "fsdp1"):
        training, other = Training(host), Training(host, seed=1)
        training.train(FIRST)
        evaluate(training.model)
        checkpoint.save(training.optimizer, f"{folder}/{host}")
        before = evaluate(training.model)
        training.train(range(5, 7))
        evaluate(other.model)
        between = evaluate(training.model)
        for each in (training, other):
            checkpoint.load(each.optimizer, f"{folder}/{host}")
        given = [evaluate(each.model) for each in (training, other)]
        told[host] = [torch.equal(before, between), *(torch.equal(before, each) for each in given)]
    return told


def test_loaded_weights_are_used_also_if_no_model_was_given(tmp_path: Any) -> None:
    for told in hosts.run_ranks(2, load_without_the_model, str(tmp_path)):
        assert told == {host: [False, True, True] for host in ("fsdp2", "hsdp", "fsdp1")}


# -- Accelerate --------------------------------------------------------------------------------------------------------


def save_portably(rank: int, version: str, folder: str) -> list[bool]:
    """Let a PortableAccelerator save and load after evaluations."""
    from accelerate.utils import patch_environment

    from sharded_shampoo4.integrations.accelerate import PortableAccelerator
    from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu

    ranks = {"rank": rank, "local_rank": rank, "world_size": 2, "local_world_size": 2, "master_addr": "127.0.0.1"}
    fsdp = {"accelerate_use_fsdp": "true", "fsdp_version": version, "fsdp_use_orig_params": "true"}
    with patch_environment(**ranks, **fsdp, master_port=0):
        rehearse_on_cpu()
        accelerator = PortableAccelerator()
        model = hosts.make_model("mlp")
        model, optimizer = accelerator.prepare(model, Shampoo4(model.named_parameters(), statistics_interval=1))
        outputs = []
        for place in ("first", "second"):
            accelerator.backward((model(INPUTS) - TARGETS).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(evaluate(model))
            accelerator.save_state(os.path.join(folder, place))
        accelerator.load_state(os.path.join(folder, "first"))
        outputs.append(evaluate(model))
    return [torch.equal(outputs[0], output) for output in outputs]


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_portable_accelerator_saves_and_loads_after_an_evaluation(version: str, tmp_path: Any) -> None:
    assert hosts.run_ranks(2, save_portably, version, str(tmp_path)) == [[True, False, True]] * 2


# -- optimizers that are made too late ---------------------------------------------------------------------------------


def make_after_an_evaluation(rank: int, folder: str) -> dict[str, Any]:
    """Make optimizers of FSDP2's models after a pass without gradients, with and without the cure."""
    told: dict[str, Any] = {}
    for case, units in (("root", True), ("everything", False), ("loading", True), ("frozen", True), ("cured", True)):
        model: Any = hosts.make_model("mlp")
        if units:
            fully_shard(model.middle, mesh=hosts.make_mesh(2))
        fully_shard(model, mesh=hosts.make_mesh(2))
        if case == "frozen":
            model.requires_grad_(False)
            model.middle.requires_grad_(True)
        evaluate(model)
        if case == "cured":
            model.reshard()
        optimizer = Shampoo4(model.named_parameters(), statistics_interval=1)
        if case == "loading":
            told[case] = said(lambda: checkpoint.load(optimizer, folder, model=model))  # noqa: B023
            continue
        hosts.train_step(model, (INPUTS, TARGETS))
        told[case] = said(optimizer.step)
        if case == "cured":
            checkpoint.save(optimizer, folder)
            told["plain"] = [name for name, p in model.named_parameters() if not hasattr(p, "placements")]
    dist.barrier()
    return told


def test_an_optimizer_of_fsdp2_s_whole_weights_is_refused(tmp_path: Any) -> None:
    for told in hosts.run_ranks(2, make_after_an_evaluation, str(tmp_path)):
        for case, count in (("root", 6), ("everything", 8), ("loading", 6)):
            assert told[case].startswith("ValueError: stem.weight is not the model's parameter"), (case, told[case])
            assert f"({count} are like that): call model.reshard()" in told[case], case
        assert told["frozen"] == told["cured"] == "nothing was raised"
        assert told["plain"] == []
