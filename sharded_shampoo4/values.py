"""Values of options as configuration files write them: ``"1e-3"``, ``"(0.9, 0.99)"``, ``100.0``, ``"true"``.

PyYAML reads ``1e-3`` as a string, JSON has no tuples, and command lines have strings only. The ``to_`` functions
convert what can mean one thing only, and return anything else unchanged, for a check to refuse.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_number(value: Any) -> Any:
    """Convert to an int or a float.

    >>> to_number("1e-3"), to_number(" 10 "), to_number("auto"), to_number(True)
    (0.001, 10, 'auto', True)
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
        with contextlib.suppress(ValueError):
            return float(value)
    elif isinstance(value, bool):
        return value
    elif isinstance(value, numbers.Integral):
        return int(value)
    elif isinstance(value, numbers.Real):
        return float(value)
    return value


def to_integer(value: Any) -> Any:
    """Convert to an int.

    >>> to_integer("100"), to_integer(100.0), to_integer("1e2"), to_integer(100.5)
    (100, 100, 100, 100.5)
    """
    number = to_number(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number if isinstance(number, int) else value


def to_boolean(value: Any) -> Any:
    """Convert to True or False.

    >>> to_boolean("True"), to_boolean("false"), to_boolean("yes"), to_boolean(1)
    (True, False, 'yes', 1)
    """
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def to_tuple(value: Any) -> Any:
    """Convert to a tuple of numbers.

    >>> to_tuple("(0.9, 0.99)"), to_tuple("0.9,0.99"), to_tuple([1, "4"]), to_tuple(0.9)
    ((0.9, 0.99), (0.9, 0.99), (1, 4), 0.9)
    """
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        found = tuple(to_number(part) for part in text.rstrip(", ").split(","))
        return value if any(isinstance(number, str) for number in found) else found
    return tuple(map(to_number, value)) if isinstance(value, Sequence) else value


def to_word(value: Any) -> Any:
    """Convert to a word in lower case; a torch.dtype becomes its name.

    >>> to_word("Staggered"), to_word(torch.bfloat16), to_word("torch.float32")
    ('staggered', 'bfloat16', 'float32')
    """
    if isinstance(value, (str, torch.dtype)):
        return str(value).strip().lower().removeprefix("torch.")
    return value


def refuse_auto(name: str, value: Any, example: Any) -> None:
    """Raise ValueError for ``"auto"``, which nobody has replaced."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        raise ValueError(
            f'{name} is "auto", which Hugging Face\'s Trainer and Accelerate replace for some options of a DeepSpeed '
            f"configuration, and Shampoo4 does not: write a value, such as {name}={example!r}"
        )


def like(name: str, value: Any, default: Any, whole: bool = False) -> Any:
    """Convert an option's value to the type of its default: a boolean, a number or a tuple of numbers.

    Args:
        name: of the option, for messages.
        value: as it was given. Tensors are returned unchanged, and so are values of options with other defaults.
        default: of the option.
        whole: whether the value has to be an integer.

    Raises:
        ValueError: it is of another type, or not a number (NaN).
    """
    if isinstance(value, Tensor):
        return value
    refuse_auto(name, value, default)
    if isinstance(default, bool):
        found = to_boolean(value)
        if isinstance(found, str):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return found
    if isinstance(default, (int, float)):
        found = to_integer(value) if whole else to_number(value)
        if not _is_number(found) or (whole and not isinstance(found, int)):
            kind = "an integer" if whole else "a number"
            raise ValueError(f"{name} must be {kind}, such as {default!r}, got {value!r}")
        return found
    if isinstance(default, tuple) and default and all(map(_is_number, default)):
        found = to_tuple(value)
        numbers_or_tensors = isinstance(found, tuple) and all(isinstance(x, Tensor) or _is_number(x) for x in found)
        if not numbers_or_tensors or len(found) != len(default):
            raise ValueError(f"{name} must be {len(default)} numbers, such as {default!r}, got {value!r}")
        return found
    if default is None and isinstance(value, str):
        return None if value.strip().lower() in ("none", "null") else to_number(to_boolean(value))
    return value


def not_negative(name: str, value: Any) -> None:
    """Raise ValueError unless ``value``, a number or a tensor of one element, is finite and at least 0."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got one of shape {tuple(value.shape)}")
    if not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
