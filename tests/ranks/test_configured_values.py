"""DeepSpeed's configuration: the optimizer's name in lower case, and values as JSON files have them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.worlds import said
from torch import Tensor

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.options import DEFAULTS, METHODS
from sharded_shampoo4.presets import PRESETS

OPTIONS = {
    "method": "shampoo",
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
    "method": "shampoo",
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
SHORT = {"type": "WarmupDecayLR", "params": {"total_num_steps": 300, "warmup_num_steps": 10}}


def train(host: str, name: str, params: dict[str, Any]) -> dict[str, Tensor]:
    config = zero.configuration(host, optimizer={"type": name, "params": params})
    engine = zero.start(zero.Replay(hosts.make_model("mlp")), config)
    assert type(engine.basic_optimizer) is Shampoo4
    for step in range(6):
        zero.step(engine, hosts.make_gradients("mlp", step))
    parameters = zero.full_parameters(engine)
    engine.destroy()
    return parameters


def preset(host: str, **params: Any) -> dict[str, Any]:
    """The options that a configuration with a preset means."""
    config = zero.configuration(host, optimizer={"type": "Shampoo4", "params": {"lr": 1e-2, **params}})
    engine = zero.start(zero.Replay(hosts.make_model("mlp")), config)
    zero.step(engine, hosts.make_gradients("mlp", 0))
    group = {name: engine.basic_optimizer.param_groups[0][name] for name in DEFAULTS}
    engine.destroy()
    return group


def warned(host: str, **params: Any) -> list[str]:
    """What is said of a run whose length stands in the configuration's scheduler."""
    params = {"lr": 1e-2, "method": "shampoo", **params}
    config = zero.configuration(host, scheduler=SHORT, optimizer={"type": "Shampoo4", "params": params})
    engine = zero.start(zero.Replay(hosts.make_model("mlp")), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            zero.step(engine, hosts.make_gradients("mlp", step))
    engine.destroy()
    return [str(warning.message) for warning in caught if "this run has" in str(warning.message)]


def configured(rank: int) -> dict[str, Any]:
    zero.prepare()
    found: dict[str, Any] = {
        host: (train(host, "Shampoo4", OPTIONS), train(host, "shampoo4", WRITTEN)) for host in STAGES
    }
    found["preset"] = {
        host: preset(host, preset="compact", codebook="normal", momentum_dtype="bfloat16") for host in STAGES
    }
    found["other preset"] = {host: preset(host, preset="shampoo-compact", codebook="linear2") for host in STAGES}
    found["long enough"] = {host: warned(host) for host in STAGES}
    found["too short"] = {host: warned(host, root_interval=200, interval_warmup="false") for host in STAGES}
    found["auto"] = said(lambda: train("zero1", "shampoo4", {**WRITTEN, "lr": "auto"}))
    found["other name"] = said(lambda: train("zero1", "shampoo4", {**WRITTEN, "precondition_frequency": 10}))
    return found


@pytest.mark.parametrize("host", STAGES)
def test_a_configuration_in_lower_case_with_strings_trains_the_same(host: str) -> None:
    for found in hosts.run_ranks_once(2, configured):
        plain, written = found[host]
        assert plain.keys() == written.keys()
        assert all(torch.equal(plain[name], written[name]) for name in plain)


@pytest.mark.parametrize("host", STAGES)
def test_a_configuration_may_name_a_preset(host: str) -> None:
    for found in hosts.run_ranks_once(2, configured):
        soap = {**DEFAULTS, **PRESETS["compact"], "rectify_steps": (1, 1), "protect": True}
        assert found["preset"][host] == {**soap, "codebook": "normal", "momentum_dtype": "bfloat16"}
        shampoo = {**DEFAULTS, **METHODS["shampoo"], "statistics_interval": 100, **PRESETS["shampoo-compact"]}
        assert found["other preset"][host] == {**shampoo, "codebook": "linear2"}


@pytest.mark.parametrize("host", STAGES)
def test_a_run_that_its_scheduler_knows_to_be_short_is_warned_about_once(host: str) -> None:
    for found in hosts.run_ranks_once(2, configured):
        assert found["long enough"][host] == []
        (said,) = found["too short"][host]
        assert "this run has 300 steps" in said and "only from step 200 on" in said


def test_what_nobody_has_filled_in_is_refused() -> None:
    for found in hosts.run_ranks_once(2, configured):
        assert found["auto"].startswith('ValueError: lr is "auto"')
        assert "here this is statistics_interval" in found["other name"]
