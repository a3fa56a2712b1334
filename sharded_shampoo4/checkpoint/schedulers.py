"""The state of an engine's scheduler in a portable checkpoint: as JSON, and as the scheduler takes it back.

JSON makes strings of all keys and lists of all tuples. What a scheduler has now tells what they were.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any


def kind(scheduler: Any) -> str:
    """Return the name of a scheduler's class, with those of inner schedulers in parentheses: "SequentialLR(StepLR)"."""
    inside = getattr(scheduler, "_schedulers", None)
    inner = ", ".join(map(kind, inside)) if isinstance(inside, (list, tuple)) else ""
    return f"{type(scheduler).__name__}({inner})" if inner else type(scheduler).__name__


def to_json(scheduler: Any) -> dict[str, Any]:
    """Copy a scheduler's state as JSON gives it back; empty if it has none.

    Raises:
        ValueError: JSON cannot hold it.
    """
    if not hasattr(scheduler, "state_dict"):
        return {}
    try:
        state: dict[str, Any] = json.loads(json.dumps(scheduler.state_dict()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a portable checkpoint stores the state of DeepSpeed's scheduler as JSON, which cannot hold that of "
            f"{kind(scheduler)} ({error}): let it have numbers, strings, lists and dicts only. The state of a LambdaLR "
            "or MultiplicativeLR has the attributes of callable objects, and nothing of functions"
        ) from error
    return state


def is_of(saved: Mapping[str, Any], scheduler: Any) -> bool:
    """Return whether an engine's progress was ``saved`` with a scheduler of the same kind.

    Early versions did not store the kind: there the keys of the states tell.
    """
    if saved.get("scheduler_class"):
        return bool(saved["scheduler_class"] == kind(scheduler))
    present = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    return _keys(saved["scheduler"]) == _keys(present)


def from_json(state: Mapping[str, Any], scheduler: Any) -> dict[str, Any]:
    """Return a state as ``scheduler`` takes it, after a trial, which leaves the scheduler as it is.

    Raises:
        ValueError: it does not take it.
    """
    before = dict(scheduler.state_dict())
    try:
        converted: dict[str, Any] = _like(before, dict(state))
        try:
            scheduler.load_state_dict(copy.deepcopy(converted))
        finally:
            scheduler.load_state_dict(before)
    except Exception as error:
        raise ValueError(
            f"DeepSpeed's scheduler {kind(scheduler)} does not take its state in the checkpoint "
            f"({type(error).__name__}: {error}): give the engine a scheduler like the one that was saved, or none"
        ) from error
    return converted


def _keys(state: Mapping[str, Any]) -> list[Any]:
    """Return the keys that tell the kind of a scheduler's state, and those of inner states.

    Keys that begin with "_" are left out, since torch changes them between versions.
    """
    inside = state.get("_schedulers")
    inner = [_keys(part) for part in inside if isinstance(part, dict)] if isinstance(inside, list) else []
    return [{key for key in state if not str(key).startswith("_")}, *inner]


def _like(present: Any, saved: Any) -> Any:
    """What JSON has made of a value, with the types of ``present``."""
    if isinstance(present, dict) and isinstance(saved, dict):
        numbers = all(isinstance(key, (int, float)) for key in present)  # also if it is empty and does not tell
        made = copy.copy(present)  # of the same class
        made.clear()
        for text, value in saved.items():
            key = _number(text) if numbers else text
            made[key] = _like(present.get(key), value)
        return made
    if isinstance(present, (list, tuple)) and isinstance(saved, list):
        last = len(present) - 1
        parts = [_like(present[min(i, last)] if present else None, value) for i, value in enumerate(saved)]
        return getattr(present, "_make", type(present))(parts) if isinstance(present, tuple) else parts
    return saved


def _number(text: str) -> int | float | str:
    """The number that JSON has made a key of; the key itself if it was none."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if type(found) in (int, float) else text
