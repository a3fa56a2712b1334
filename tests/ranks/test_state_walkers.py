"""What walks ``optimizer.state``: torch's state dicts of all options, hooks, cleared states, FSDP1's own API."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support.contract import make_optimizer
from support.training import FIRST, OPTIONS, THEN, Training
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from sharded_shampoo4 import Shampoo4

WAYS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
}


METHODS: dict[str, dict[str, str]] = {
    "shampoo": {},
    "soap": {"method": "soap", "momentum_dtype": "int8", "second_moment_dtype": "bfloat16"},
}


def go_on(rank: int, host: str, name: str, method: str) -> bool:
    """Whether a fresh model and optimizer continue bitwise with what torch's functions have saved and set."""
    options = WAYS[name]
    first, second = (Training(host, seed=seed, **METHODS[method]) for seed in (0, 1))
    first.train(FIRST)
    if host in ("none", "ddp"):
        first.optimizer.consolidate_state_dict()
    getting = StateDictOptions(**{key: on for key, on in options.items() if key != "broadcast_from_rank0"})
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=getting))
    if rank and "broadcast_from_rank0" in options:
        state = {}
    set_model_state_dict(second.model, copy.deepcopy(get_model_state_dict(first.model)))
    for _ in range(2):  # the second time in an optimizer that has states
        set_optimizer_state_dict(
            second.model, second.optimizer, copy.deepcopy(state), options=StateDictOptions(**options)
        )
    expected, found = first.train(THEN), second.train(THEN)
    return all(torch.equal(expected[key], found[key]) for key in expected)


def go_on_everywhere(rank: int, host: str) -> dict[tuple[str, str], bool]:
    return {(name, method): go_on(rank, host, name, method) for name in WAYS for method in METHODS}


@pytest.mark.parametrize("host", ["ddp", "fsdp2", "hsdp"])
def test_torchs_functions_save_and_set_whole_states(host: str) -> None:
    for found in hosts.run_ranks(2, go_on_everywhere, host):
        assert found == dict.fromkeys(((name, method) for name in WAYS for method in METHODS), True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["as it is", "flattened", "full"])
def test_the_same_in_one_process(name: str, method: str) -> None:
    with hosts.one_thread():
        assert go_on(0, "none", name, method)


def ask_fsdp1(rank: int) -> list[str]:
    return [message for options in METHODS.values() for message in ask_fsdp1_with(options)]


def ask_fsdp1_with(options: dict[str, str]) -> list[str]:
    training = Training("fsdp1", **options)
    training.train(FIRST)
    found = [
        hosts.said(lambda: FullyShardedDataParallel.optim_state_dict(training.model, training.optimizer)),
        hosts.said(lambda: get_optimizer_state_dict(training.model, training.optimizer)),
    ]
    training.optimizer.consolidate_state_dict()
    found.append(hosts.said(lambda: FullyShardedDataParallel.optim_state_dict(training.model, training.optimizer)))
    other = Training("fsdp1", seed=1, **options)
    whole = copy.deepcopy(training.optimizer.state_dict())
    found.append(hosts.said(lambda: set_optimizer_state_dict(other.model, other.optimizer, whole)))
    return found


def test_fsdp1s_own_states_are_refused_and_the_message_says_what_to_call() -> None:
    for found in hosts.run_ranks(2, ask_fsdp1):
        assert len(found) == 8
        for message in found:
            assert message.startswith("RuntimeError: FSDP.optim_state_dict()"), message
            assert "optimizer.consolidate_state_dict()" in message and "sharded_shampoo4.checkpoint" in message


def fresh_states(rank: int, host: str) -> tuple[bool, str]:
    """Of an optimizer that is bound but has taken no step, and what is said of one that has."""
    training = Training(host)
    hosts.set_gradients(training.model, host, {})
    alone = Training("none")
    packed, expected = [], []
    for optimizer, found in ((training.optimizer, packed), (alone.optimizer, expected)):
        optimizer.attach("state_dict()", None)
        states = optimizer.state_dict()["state"].values()
        found += [state["preconditioner"].clone() for state in states if "preconditioner" in state]
    same = len(packed) == 3 and all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))
    training.train(range(1))
    return same, hosts.said(training.optimizer.state_dict)


@pytest.mark.parametrize("host", ["ddp", "fsdp1"])
def test_factors_that_took_no_step_are_known_to_every_rank(host: str) -> None:
    for same, then in hosts.run_ranks(2, fresh_states, host):
        assert same and "spread over ranks: call optimizer.consolidate_state_dict()" in then


def clear_and_train(rank: int, host: str) -> list[Any]:
    return [clear_and_train_with(rank, host, options) for options in METHODS.values()]


def clear_and_train_with(rank: int, host: str, options: dict[str, str]) -> tuple[bool, str]:
    """Weights after states were cleared, with a new optimizer on the same weights; and what one rank alone hears."""
    training = Training(host, **options)
    training.train(range(5))
    training.optimizer.state.clear()
    other = Training(host, **options)
    other.train(range(5))
    other.optimizer = make_optimizer(other.model, host, {**OPTIONS, **options})
    first, second = training.train(range(5, 12)), other.train(range(5, 12))
    if rank == 1:
        training.optimizer.state.clear()
    same = all(torch.equal(first[name], second[name]) for name in first)
    return same, hosts.said(lambda: training.train(range(1)))


@pytest.mark.parametrize("host", ["ddp", "fsdp1", "fsdp2"])
def test_clearing_the_states_clears_the_factors(host: str) -> None:
    for found in hosts.run_ranks(2, clear_and_train, host):
        for same, alone in found:
            assert same
            assert "was cleared, but not on rank 0" in alone


def small() -> tuple[nn.Module, Shampoo4]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    options = {"method": "shampoo", "statistics_interval": 1, "root_interval": 2, "min_quant_numel": 0}
    return model, Shampoo4(model.named_parameters(), **options)


def step(model: nn.Module, optimizer: Shampoo4, count: int = 1) -> None:
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(12, 8)).square().mean().backward()
        optimizer.step()


def test_hooks_see_the_factors() -> None:
    model, optimizer = small()
    step(model, optimizer, 3)
    seen: list[Any] = []

    def names(state_dict: dict[str, Any]) -> list[str]:
        return sorted(state_dict["state"][0])

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(names(state_dict)))
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(names(state_dict)))
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(sorted(own.state[model[0].weight])))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    every = ["exp_avg", "exp_avg_sq", "preconditioner", "step"]
    assert seen == ["before", every, every, every]

    without = small()[1]
    handle = without.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "state": "elsewhere"})
    assert without.state_dict()["state"] == "elsewhere"
    handle.remove()
    assert without.state_dict()["state"] == {}
    other = small()[1]
    other.register_load_state_dict_pre_hook(lambda _, state_dict: copy.deepcopy(state))
    other.load_state_dict({"state": {}, "param_groups": []})
    assert torch.equal(other.state_dict()["state"][0]["preconditioner"], state["state"][0]["preconditioner"])


def test_states_that_are_cleared_or_replaced() -> None:
    model, optimizer = small()
    step(model, optimizer, 3)
    optimizer.state.clear()
    assert optimizer.state_dict()["state"] == {}
    step(model, optimizer)
    assert optimizer._session.last is not None
    assert [matrix.step for matrix in optimizer._session.last.matrices] == [1, 1]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.state.clear()
    step(model, optimizer)
    assert [matrix.step for matrix in optimizer._session.last.matrices] == [1, 1]

    weight = model[0].weight
    optimizer.state[weight] = {key: value for key, value in optimizer.state[weight].items() if key != "preconditioner"}
    with pytest.warns(UserWarning, match=r"optimizer.state of 0.weight was replaced without the factors"):
        step(model, optimizer)
    assert [matrix.step for matrix in optimizer._session.last.matrices] == [1, 2]
    with pytest.raises(TypeError, match=r"optimizer.state does not hold the factors .* optimizer.state_dict\(\)"):
        copy.deepcopy(optimizer.state)
    again = copy.deepcopy(optimizer)
    assert torch.equal(
        again.state_dict()["state"][0]["preconditioner"], optimizer.state_dict()["state"][0]["preconditioner"]
    )
