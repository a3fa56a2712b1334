"""The host that the contributors' page adds as an example: its code, as it stands there, trains as one process does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import worlds
from support.contract import CASES, STEPS, make_gradients_for_zero, make_optimizer
from torch import Tensor

from sharded_shampoo4 import hosts

PAGE = Path(__file__).parents[2] / "sharded_shampoo4" / "README.md"
SHOWN = ["mlp, blocks", "tied, naive", "mlp, 32 bits"]


def example() -> dict[str, Any]:
    """What the page's block of code defines."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Host)" in block]
    assert len(code.splitlines()) <= 60
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def replay(name: str, framework: Any = None) -> dict[str, Tensor]:
    """The weights after a case's gradients, which every rank has in full."""
    kind, options = CASES[name]
    model = worlds.make_model(kind)
    optimizer = make_optimizer(model, "none", options)
    stepped = optimizer if framework is None else framework(optimizer)
    for step in range(STEPS):
        worlds.set_gradients(model, "none", make_gradients_for_zero(kind, step))
        stepped.step()
    if framework is not None and dist.get_world_size() > 1:
        shares = [0] * dist.get_world_size()
        dist.all_gather_object(shares, optimizer.state_bytes()["preconditioner"])
        assert max(shares) < 0.8 * sum(shares), "every rank should hold a part of the factors"
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


def replay_on_ranks(rank: int) -> dict[str, dict[str, Tensor]]:
    shown = example()
    hosts.ADAPTERS.append(shown["SlicedHost"])
    return {name: replay(name, shown["Sliced"]) for name in SHOWN}


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_example_of_a_host_trains_as_one_process(world_size: int) -> None:
    with worlds.one_thread():
        alone = {name: replay(name) for name in SHOWN}
    for found in worlds.run_ranks(world_size, replay_on_ranks):
        for name in SHOWN:
            assert found[name].keys() == alone[name].keys()
            assert all(torch.equal(found[name][key], alone[name][key]) for key in alone[name]), name
