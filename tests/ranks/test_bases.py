"""Torch's own elementwise rules as the base, on the shards that a rank holds of DTensors."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support.contract import make_optimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_shampoo4.placement import local_tensor

RULES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("AdamW", "Adagrad", "Adamax", "Adadelta", "ASGD", "NAdam", "RAdam", "RMSprop")},
    "SGD": {"momentum": 0.9},
}
HOSTS = ("fsdp2", "hsdp")
LATE = "stem.bias"  # which has its first gradient in the third step


def train(name: str, host: str, foreach: bool) -> dict[str, Any]:
    """Five steps with the same gradients under every host; afterwards the parameters, and the base's states."""
    model = hosts.wrap(hosts.make_model("mlp"), host)
    options = {"base": getattr(torch.optim, name), "lr": 1e-2, "weight_decay": 0.0, "foreach": foreach, **RULES[name]}
    optimizer = make_optimizer(model, host, options)
    for step in range(5):
        gradients: dict[str, Tensor | None] = dict(hosts.make_gradients("mlp", step))
        if step < 2:
            gradients[LATE] = None
        hosts.set_gradients(model, host, gradients)
        optimizer.step()
    states, sharded = {}, []
    standing = [weakref.ref(local_tensor(parameter.grad)) for parameter in hosts.named(model, host).values()]
    del gradients
    optimizer.zero_grad()
    held = sum(gradient() is not None for gradient in standing)
    for key, parameter in hosts.named(model, host).items():
        for kept, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                continue
            sharded += [isinstance(value, DTensor)] * (value.shape == parameter.shape)
            states[f"{key} {kept}"] = value.full_tensor() if isinstance(value, DTensor) else value
    return {"parameters": hosts.full_parameters(model, host), "states": states, "sharded": sharded, "held": held}


def on_a_rank(rank: int) -> dict[tuple[str, str, bool], dict[str, Any]]:
    return {(name, host, each): train(name, host, each) for name in RULES for host in HOSTS for each in (True, False)}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", RULES)
def test_torchs_rules_under_fsdp2(name: str, host: str, foreach: bool) -> None:
    with hosts.one_thread():
        expected = train(name, "none", foreach)
    for rank in hosts.run_ranks_once(2, on_a_rank):
        found = rank[name, host, foreach]
        assert found["sharded"] and all(found["sharded"])
        assert found["held"] == expected["held"] == 0, "gradients that are still in memory"
        torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=0, atol=0)
        torch.testing.assert_close(found["states"], expected["states"], rtol=0, atol=0)


def train_with_late_momentum(host: str) -> dict[str, Tensor]:
    model = hosts.wrap(hosts.make_model("mlp"), host)
    optimizer = make_optimizer(model, host, {"base": "sgd", "method": "shampoo", "lr": 1e-2})
    for step in range(6):
        for group in optimizer.param_groups:
            group["momentum"] = 0.9 if step > 1 else 0.0
        hosts.set_gradients(model, host, hosts.make_gradients("mlp", step))
        optimizer.step()
    return hosts.full_parameters(model, host)


def late_momentum_on_a_rank(rank: int) -> dict[str, Tensor]:
    return train_with_late_momentum("fsdp2")


def test_states_that_come_in_a_later_step() -> None:
    with hosts.one_thread():
        expected = train_with_late_momentum("none")
    for found in hosts.run_ranks_once(2, late_momentum_on_a_rank):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
