"""Where ranks hold whole parameters, programs call state_dict() on one of them: it must not wait for the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support import worlds as hosts
from support.contract import make_optimizer

from sharded_shampoo4 import Shampoo4

OPTIONS: dict[str, Any] = {"max_preconditioner_dim": 30, "min_quant_numel": 0}


def advance(model: torch.nn.Module, optimizer: Shampoo4, step: int) -> None:
    hosts.set_gradients(model, "ddp", hosts.make_gradients("mlp", step))
    optimizer.step()


def save_on_one_rank(rank: int, options: dict[str, Any], loads: bool) -> list[bool]:
    model = hosts.wrap(hosts.make_model("mlp"), "ddp")
    optimizer = make_optimizer(model, "ddp", options)
    advance(model, optimizer, 0)
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    if loads:
        optimizer.load_state_dict(saved)
        optimizer.consolidate_state_dict()
    same = []
    if rank == 0:
        again = optimizer.state_dict()["state"]
        same = [torch.equal(again[key][name], value) for key in again for name, value in saved["state"][key].items()]
    advance(model, optimizer, 1)
    return same


def test_state_dict_after_a_load() -> None:
    same, _ = hosts.run_ranks(2, save_on_one_rank, OPTIONS, True, timeout=60)
    assert same and all(same)


def test_state_dict_where_nothing_is_preconditioned() -> None:
    same, _ = hosts.run_ranks(2, save_on_one_rank, {"precondition": False}, False, timeout=60)
    assert same and all(same)
