"""What ``state_dict()`` and ``load_state_dict()`` do beside packing: hooks, names, marks in ``optimizer.state``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from .packing import STATE_KEY
from .report import shorten

Match = Callable[[Iterable[str], Iterable[str]], dict[str, str]]
_NOT_OPTIONS = ("params", "param_names")


class _Mark:
    """Stands in ``optimizer.state[p]["preconditioner"]`` for the factors of ``p``, which are kept elsewhere.

    Whoever asks ``optimizer.state`` what a parameter has finds the key; ``state_dict()`` puts the factors in its place.
    """

    def __repr__(self) -> str:
        return "<kept by Shampoo4: see state_dict()>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "optimizer.state does not hold the factors of Shampoo4, so a copy of it would lose them: copy or save "
            "optimizer.state_dict(), or use sharded_shampoo4.checkpoint"
        )


MARK = _Mark()


def without_marks(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """States of the base alone; parameters for which nothing is left are left out."""
    plain = {key: {name: v for name, v in entry.items() if v is not MARK} for key, entry in state.items()}
    return {key: entry for key, entry in plain.items() if entry or not state[key]}


def is_marked(state: Mapping[Tensor, Any], parameter: Tensor) -> bool:
    """Whether ``state`` has, for ``parameter``, what stands for its factors."""
    return state.get(parameter, {}).get(STATE_KEY) is MARK


@contextlib.contextmanager
def held_back(*hooks: dict[int, Any]) -> Iterator[None]:
    """Keep registered hooks from being called in here."""
    kept = [dict(registered) for registered in hooks]
    for registered in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, own in zip(hooks, kept, strict=True):
            registered.update(own)


def arranged(state_dict: dict[str, Any], names: Sequence[Sequence[str]], match: Match) -> dict[str, Any]:
    """``state_dict`` with its parameters in the groups and in the order of ``names``, if it knows names too.

    torch itself loads by position, whatever the names.

    Raises:
        ValueError: it has other names, or several parameters of one name in another order; or a group here has
            parameters of several groups there, whose options differ.
    """
    groups = state_dict["param_groups"]
    given = [_names_of(group) for group in groups]
    saved = [name for own in given if own is not None for name in own]
    here = [name for own in names for name in own]
    if any(own is None for own in given) or len(saved) != len(here):
        return state_dict
    by_torch = all(isinstance(key, str) for group in groups for key in group["params"])  # it has put them in order
    double = sorted({name for own in (saved, here) for name in own if own.count(name) > 1})
    found = {} if double else match(saved, here)
    same = saved == here if double else [found.get(name) for name in saved] == here
    if same and [len(group["params"]) for group in groups] == [len(own) for own in names]:
        return state_dict
    if double and not by_torch:
        raise ValueError(
            f"several parameters have the name {double[0]} and their order has changed: no telling which is which"
        )
    if len(found) < len(here):
        if by_torch:
            return state_dict
        raise ValueError(
            f"the state_dict is of parameters {shorten(name for name in saved if name not in found)}, this optimizer "
            f"has {shorten(name for name in here if name not in found.values())}: to load by position, remove "
            "param_names from the state_dict's param_groups"
        )
    places = {
        found[name]: (number, key)
        for number, (group, own) in enumerate(zip(groups, given, strict=True))
        for name, key in zip(own or (), group["params"], strict=True)
    }
    return {
        **state_dict,
        "param_groups": [
            _group_of([(name, *places[name]) for name in own], groups, number) for number, own in enumerate(names)
        ],
    }


def _names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a saved group's parameters; None if it does not tell."""
    params = group["params"]
    names = params if all(isinstance(key, str) for key in params) else group.get("param_names")
    return list(names) if names is not None and len(names) == len(params) else None


def _group_of(members: Sequence[tuple[str, int, Any]], groups: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """A group with these members: their names, the saved groups that they are from, and their keys."""
    sources: dict[int, str] = {}
    for name, source, _ in members:
        sources.setdefault(source, name)
    first, *others = [groups[source] for source in sources] or [groups[min(number, len(groups) - 1)]]
    for other, (source, name) in zip(others, list(sources.items())[1:], strict=True):
        for option in (option for option in first if option not in _NOT_OPTIONS):
            if first[option] != other.get(option):
                raise ValueError(
                    f"param group {number} has parameters of several groups of the state_dict, whose {option} differ: "
                    f"{first[option]!r} of {next(iter(sources.values()))} and {other.get(option)!r} of {name}, in "
                    f"group {source}; make the groups as they were"
                )
    return {**first, "params": [key for _, _, key in members], "param_names": [name for name, _, _ in members]}
