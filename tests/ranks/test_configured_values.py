"""DeepSpeed's configuration: the optimizer's name in lower case, and values as JSON files have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.worlds import said
from torch import Tensor

from sharded_shampoo4 import Shampoo4

OPTIONS = {
    "lr": 1e-2,
    "betas": (0.8, 0.95),
    "weight_decay": 0.1,
    "statistics_interval": 2,
    "root_interval": 4,
    "rectify_steps": (1, 2),
    "min_quant_numel": 0,
    "max_preconditioner_dim": 30,
}
WRITTEN = {
    "lr": "1e-2",
    "betas": "[0.8, 0.95]",
    "weight_decay": "0.1",
    "statistics_interval": 2.0,
    "root_interval": "4",
    "rectify_steps": [1, 2.0],
    "min_quant_numel": "0",
    "max_preconditioner_dim": 30.0,
}
STAGES = ("zero0", "zero1", "zero3")


def train(host: str, name: str, params: dict[str, Any]) -> dict[str, Tensor]:
    config = zero.configuration(host, optimizer={"type": name, "params": params})
    engine = zero.start(zero.Replay(hosts.make_model("mlp")), config)
    assert type(engine.basic_optimizer) is Shampoo4
    for step in range(6):
        zero.step(engine, hosts.make_gradients("mlp", step))
    parameters = zero.full_parameters(engine)
    engine.destroy()
    return parameters


def configured(rank: int) -> dict[str, Any]:
    zero.prepare()
    found: dict[str, Any] = {
        host: (train(host, "Shampoo4", OPTIONS), train(host, "shampoo4", WRITTEN)) for host in STAGES
    }
    found["auto"] = said(lambda: train("zero1", "shampoo4", {**WRITTEN, "lr": "auto"}))
    found["other name"] = said(lambda: train("zero1", "shampoo4", {**WRITTEN, "precondition_frequency": 10}))
    return found


@pytest.mark.parametrize("host", STAGES)
def test_a_configuration_in_lower_case_with_strings_trains_the_same(host: str) -> None:
    for found in hosts.run_ranks_once(2, configured):
        plain, written = found[host]
        assert plain.keys() == written.keys()
        assert all(torch.equal(plain[name], written[name]) for name in plain)


def test_what_nobody_has_filled_in_is_refused() -> None:
    for found in hosts.run_ranks_once(2, configured):
        assert found["auto"].startswith('ValueError: lr is "auto"')
        assert "here this is statistics_interval" in found["other name"]
