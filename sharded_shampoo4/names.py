"""Names of parameters without what wrappers put into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from . import hosts

# What activation checkpointing and torch.compile put into names; no model has modules of such names itself.
_TORCH_PARTS = ("_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it.

    ``module.``, which DDP and DeepSpeed put before all names, may be a part of the model as well: see
    :func:`plain_names` and :func:`names_in`.
    """
    return ".".join(part for part in name.split(".") if not _is_mark(part))


def plain_names(names: Sequence[str]) -> list[str]:
    """Names of an optimizer's parameters without what wrappers put into them.

    ``module.`` is taken from the front as long as all names begin with it: a wrapper puts it before all of them.

    Raises:
        ValueError: two names become equal.

    >>> plain_names(["module._orig_mod.0.weight", "module._orig_mod.module.bias"])
    ['0.weight', 'module.bias']
    """
    plain = [plain_name(name) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    seen: dict[str, str] = {}
    for name, found in zip(names, plain, strict=True):
        other = seen.setdefault(found, name)
        if other != name:
            raise ValueError(f"{other} and {name} are both named {found} without what wrappers put into names")
    return plain


def match_names(saved: Iterable[str], here: Iterable[str], complete: bool = True) -> dict[str, str]:
    """The name in ``here`` of every one in ``saved`` that is there, whatever wrappers either of them was named under.

    Equal names are matched first. Then names are compared as :func:`plain_names` gives them, and last without any
    ``module.`` in them, which appears inside a name where only a part of a model is wrapped.

    Args:
        saved: plain names or, in checkpoints of early versions, names as they were given.
        here: plain names.
        complete: all of ``here`` must be found too; otherwise, only all of ``saved``.

    Returns:
        Names in ``here`` by names in ``saved``. Where no way of reading names brings all of them together, only those
        that are equal as plain names.

    Raises:
        ValueError: two names become equal.
    """
    saved, here = list(saved), list(here)
    readings = (lambda names: names), plain_names, _without_module
    matches = []
    for read in readings:
        there = dict(zip(read(saved), saved, strict=True))
        own = dict(zip(read(here), here, strict=True))
        unique = len(there) == len(saved) and len(own) == len(here)
        if unique and there.keys() <= own.keys() and (not complete or len(there) == len(own)):
            return {there[name]: own[name] for name in there}
        matches.append({there[name]: own[name] for name in there.keys() & own.keys()})
    return matches[1]


def names_in(model: nn.Module) -> dict[Tensor, str]:
    """The plain name of every parameter and buffer in ``model``, wrapped or not; the first one of those it shares.

    Unlike names alone, a model tells which ``module.`` belongs to a wrapper.

    Raises:
        ValueError: two parameters have one name without what wrappers put into names.
    """
    found: dict[Tensor, str] = {}
    taken: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = _name_in(model, name)
        if taken.setdefault(plain, tensor) is not tensor:
            raise ValueError(f"two parameters of the model have the name {plain} without what wrappers put into names")
        found[tensor] = plain
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return ``model`` without DistributedDataParallel, a framework's engine or torch.compile around it."""
    while True:
        if _is_wrapper(model):
            model = model.module  # type: ignore[assignment]
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _name_in(model: nn.Module, name: str) -> str:
    """``name``, of a parameter in ``model``, without the parts that stand for wrappers."""
    module: Any = model
    parts = []
    for part in name.split("."):
        if not _is_mark(part) and not (part == "module" and _is_wrapper(module)):
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def _is_mark(part: str) -> bool:
    """Whether a part of a name stands for a wrapper."""
    return part in _TORCH_PARTS or part in hosts.name_parts()


def _is_wrapper(module: Any) -> bool:
    """Whether ``module`` keeps the model that it wraps as ``module``."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return isinstance(module, parallel) or hosts.is_wrapper(module)


def _without_module(names: Sequence[str]) -> list[str]:
    return [".".join(part for part in plain_name(name).split(".") if part != "module") for name in names]
