"""Parameters are known by name or by identity, in whatever order, group or dictionary they stand."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint

OPTIONS: dict[str, Any] = {"statistics_interval": 1, "min_quant_numel": 0, "lr": 0.01}
NAMES = ("a", "b", "c", "d")
Groups = Sequence[Sequence[str]]


@pytest.fixture(params=["shampoo", "soap"], autouse=True)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both methods: with "soap" the base has no states of matrices."""
    monkeypatch.setitem(OPTIONS, "method", request.param)
    if request.param == "shampoo":
        monkeypatch.setitem(OPTIONS, "root_interval", 2)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Of one shape, so that no shape tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(6, 6, generator=generator)) for name in NAMES}


def optimizer_of(held: dict[str, nn.Parameter], groups: Groups = (NAMES,), **options: Any) -> Shampoo4:
    return Shampoo4(
        [{"params": [(name, held[name]) for name in group], "lr": 0.01 + 0.01 * number, **options}
         for number, group in enumerate(groups)],
        **OPTIONS,
    )  # fmt: skip


def train(held: dict[str, nn.Parameter], optimizer: Shampoo4, steps: range) -> dict[str, Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in held.values():
            parameter.grad = torch.randn(6, 6, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in held.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def by_state_dict(own: Shampoo4, other: Shampoo4, folder: Path) -> None:
    for source, target in zip(values_of(own), values_of(other), strict=True):
        target.data.copy_(source)
    other.load_state_dict(copy.deepcopy(own.state_dict()))


def values_of(optimizer: Shampoo4) -> list[Tensor]:
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    return [parameter for _, parameter in sorted(pairs, key=lambda pair: pair[0])]


def by_checkpoint(own: Shampoo4, other: Shampoo4, folder: Path) -> None:
    checkpoint.save(own, folder)
    checkpoint.load(other, folder)


# Groups of the first optimizer, and of the second, which has the same options for each parameter or one group.
ORDERS: dict[str, tuple[Groups, Groups]] = {
    "order": (["abcd"], ["dbca"]),
    "groups": (["ab", "cd"], ["cd", "ab"]),
    "order within groups": (["ab", "cd"], ["ba", "dc"]),
    "split": (["abcd"], ["ac", "bd"]),
}


@pytest.mark.parametrize("move", [by_state_dict, by_checkpoint])
@pytest.mark.parametrize("name", ORDERS)
def test_another_order_is_matched_by_name(name: str, move: Callable[..., None], tmp_path: Path) -> None:
    (before, after), held, others = ORDERS[name], parameters(), parameters(1)
    own, other = optimizer_of(held, before), optimizer_of(others, after)
    train(held, own, range(3))
    move(own, other, tmp_path)
    rates = {name: g["lr"] for g in own.param_groups for name in g["param_names"]}
    assert {name: g["lr"] for g in other.param_groups for name in g["param_names"]} == rates
    assert [g["param_names"] for g in other.param_groups] == [list(group) for group in after]
    assert same(train(held, own, range(3, 7)), train(others, other, range(3, 7)))


def test_a_group_of_parameters_of_several_groups(tmp_path: Path) -> None:
    """Their options differ: there is no right value for all of them."""
    held, others = parameters(), parameters(1)
    own, other = optimizer_of(held, ["ab", "cd"]), optimizer_of(others, ["acbd"])
    train(held, own, range(3))
    with pytest.raises(ValueError, match=r"param group 0 has .* whose lr differ: 0.01 of a and 0.02 of c, in group 1"):
        other.load_state_dict(own.state_dict())
    checkpoint.save(own, tmp_path)
    other.param_groups[0]["lr"] = 0.5
    with pytest.warns(UserWarning, match=r"whose lr differ \(0.01 of a, 0.02 of c\): it keeps 0.5"):
        checkpoint.load(other, tmp_path)
    assert other.param_groups[0]["lr"] == 0.5
    for group in own.param_groups:
        group["lr"] = 0.5
    assert same(train(held, own, range(3, 7)), train(others, other, range(3, 7)))


def test_other_names_are_refused_and_wrappers_names_are_not() -> None:
    held, others = parameters(), parameters()
    own = optimizer_of(held)
    train(held, own, range(3))
    state = own.state_dict()
    renamed = Shampoo4([(f"x{name}", others[name]) for name in NAMES], **OPTIONS)
    with pytest.raises(ValueError, match=r"is of parameters a, b, c, \.\.\., .* has xa, .* remove param_names"):
        renamed.load_state_dict(state)
    by_place = copy.deepcopy(state)
    del by_place["param_groups"][0]["param_names"]
    renamed.load_state_dict(by_place)
    assert renamed.param_groups[0]["param_names"] == ["xa", "xb", "xc", "xd"]
    wrapped = Shampoo4([(f"module._orig_mod.{name}", others[name]) for name in "dcba"], **OPTIONS)
    wrapped.load_state_dict(copy.deepcopy(state))
    for name in NAMES:
        others[name].data.copy_(held[name])
    wrapped.param_groups[0]["lr"] = own.param_groups[0]["lr"]
    assert same(train(held, own, range(3, 7)), train(others, wrapped, range(3, 7)))


def test_several_parameters_of_one_name(tmp_path: Path) -> None:
    def twins(order: Sequence[int]) -> tuple[dict[str, nn.Parameter], Shampoo4]:
        held = parameters()
        names = ["weight", "weight", "x", "y"]
        return held, Shampoo4([(names[place], held[NAMES[place]]) for place in order], **OPTIONS)

    held, own = twins((0, 1, 2, 3))
    train(held, own, range(3))
    assert list(own.health()) == ["weight (1 of 2, group 0)", "weight (2 of 2, group 0)", "x", "y"]
    again = twins((0, 1, 2, 3))
    again[1].load_state_dict(copy.deepcopy(own.state_dict()))
    train(held, own, range(3, 6))
    with pytest.raises(ValueError, match="several parameters have the name weight and their order has changed"):
        twins((0, 1, 3, 2))[1].load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="two parameters have the name weight"):
        checkpoint.save(own, tmp_path)


# -- dictionaries, groups and parameters that come and go --------------------------------------------------------------


def test_groups_may_be_other_dictionaries_in_another_order() -> None:
    held, others = parameters(), parameters()
    own, other = optimizer_of(held, ["ab", "cd"]), optimizer_of(others, ["ab", "cd"])
    train(held, own, range(3))
    train(others, other, range(3))
    other.param_groups[0] = dict(other.param_groups[0])
    first, second = train(held, own, range(3, 5)), train(others, other, range(3, 5))
    assert same(first, second)
    other.param_groups.reverse()
    assert same(train(held, own, range(5, 7)), train(others, other, range(5, 7)))
    moved = other.param_groups[0]["params"].pop(0)  # c
    other.param_groups[1]["params"].append(moved)
    held_c = own.param_groups[1]["params"].pop(0)
    own.param_groups[0]["params"].append(held_c)
    assert same(train(held, own, range(7, 9)), train(others, other, range(7, 9)))
    assert [group["param_names"] for group in other.param_groups] == [["d"], ["a", "b", "c"]]
    again = copy.deepcopy(other)
    assert [group["param_names"] for group in again.param_groups] == [["d"], ["a", "b", "c"]]
    again.load_state_dict(other.state_dict())


def test_what_left_the_groups_is_let_go(tmp_path: Path) -> None:
    held = parameters()
    own = optimizer_of(held, ["abcd"])
    train(held, own, range(3))
    bytes_of_all = own.state_bytes()
    gone = held.pop("b")
    own.param_groups[0]["params"] = [p for p in own.param_groups[0]["params"] if p is not gone]
    state = own.state_dict()
    assert sorted(state["state"]) == [0, 1, 2] and state["param_groups"][0]["param_names"] == ["a", "c", "d"]
    reference = weakref.ref(gone)
    del gone
    train(held, own, range(3, 5))
    gc.collect()
    assert reference() is None
    assert list(own.health()) == ["a", "c", "d"]
    assert {kind: 3 * size for kind, size in bytes_of_all.items()} == {k: 4 * s for k, s in own.state_bytes().items()}
    checkpoint.save(own, tmp_path)
    copy.deepcopy(own)
    others = parameters(1)
    others.pop("b")
    other = optimizer_of(others, ["acd"])
    checkpoint.load(other, tmp_path)
    assert same(train(held, own, range(5, 8)), train(others, other, range(5, 8)))


def test_factors_that_were_loaded_and_left_are_let_go() -> None:
    held = parameters()
    own = optimizer_of(held, ["ab", "cd"])
    train(held, own, range(3))
    own.load_state_dict(own.state_dict())
    own.param_groups.pop()
    assert sorted(own.state_dict()["state"]) == [0, 1]
    train(held, own, range(3, 4))
    assert list(own.health()) == ["a", "b"]


def test_replaced_parameters_are_known_by_their_order() -> None:
    held = parameters()
    own = optimizer_of(held)
    group = own.param_groups[0]
    new = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in held.items()}
    group["params"] = [new["a"], held["b"], new["c"], new["d"]]
    names = [entry.name for entry in own._members.entries(own.param_groups)]
    assert names == list(NAMES)
    group["params"] = [new["d"], new["a"]]  # known by now, in whatever order
    assert [entry.name for entry in own._members.entries(own.param_groups)] == ["d", "a"]

    other = optimizer_of(held)
    other.param_groups[0]["params"] = [new["a"], held["c"], held["b"], new["d"]]
    with pytest.raises(ValueError, match="no telling which is which"):
        other.step()
    other.param_groups[0]["params"] = [new["a"], new["b"]]  # which two of four equal shapes?
    with pytest.raises(ValueError, match="no telling which is which"):
        other.step()
    other.param_groups[0]["params"] = [*held.values(), nn.Parameter(torch.zeros(6, 6))]
    with pytest.raises(ValueError, match="param group 0 has a parameter that it was not given: use add_param_group"):
        other.step()


def test_states_of_parameters_that_are_replaced_are_not_lost_in_silence() -> None:
    held = parameters()
    own = optimizer_of(held)
    train(held, own, range(3))
    own.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in held.values()]
    with pytest.raises(ValueError, match="a had states when a Parameter took its place"):
        own.step()
