"""What is checked, and said, when a step attaches parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from .held import HeldParameter
from .members import Members
from .numerics.matrix import Matrix
from .report import shorten, warn


def check_something_is_left(entries: Sequence[HeldParameter], matrices: Sequence[Matrix], members: Members) -> None:
    """Warn, or raise ValueError under flat tensors, if nothing is preconditioned that should be.

    Nothing may become the base optimizer in silence.
    """
    if matrices or not any(entry.options.precondition for entry in entries):
        return
    if not any(entry.flat for entry in entries):
        warn("Shampoo4 has no matrix to precondition: only the base optimizer is at work")
    elif not members.has_matrix():
        raise ValueError("Shampoo4 finds no matrix to precondition in what ZeRO has made of the parameters")


def refuse_shared_gradients(entries: Sequence[HeldParameter]) -> None:
    """Raise ValueError if one tensor is the gradient of two holders: a step writes directions over gradients."""
    seen: dict[int, HeldParameter] = {}
    for entry in entries:
        if entry.holder.grad is None:
            continue
        first = seen.setdefault(id(entry.holder.grad), entry)
        if first.holder is not entry.holder and (first.view or entry.view):
            raise ValueError(
                f"{first.name} and {entry.name} have one tensor as their gradients, and Shampoo4 writes directions "
                "over gradients: give one of them a copy, p.grad = p.grad.clone()"
            )


def warn_if_lost(
    chosen: Sequence[HeldParameter], state: Mapping[Tensor, Any], members: Members, loaded: Container[Tensor]
) -> None:
    """Warn if the base goes on where the factors begin: DeepSpeed's universal checkpoint knows no factors."""
    resumed = [e.name for e in chosen if e.flat and _steps(state, e.holder) and e.parameter not in loaded]
    if resumed:
        members.check_own_options()
        warn(
            f"the base optimizer's states of {shorten(resumed)} were loaded without preconditioners (as from "
            "DeepSpeed's universal checkpoint): the factors start anew, and directions are plain gradients until the "
            "next root step"
        )


def without_gradients(entries: Sequence[HeldParameter]) -> str:
    """What to say of a step in which no parameter has a gradient on any rank."""
    frozen = sum(not entry.parameter.requires_grad for entry in entries)
    return (
        f"none of the {len(entries)} parameters in this step has a gradient ({frozen} are frozen; the first is "
        f"{entries[0].name}): call backward() before step(), and zero_grad() after it. If the model does have "
        "gradients, its parameters are others than the optimizer's: FSDP2's fully_shard() and other wrappers replace "
        "them, so make the optimizer after the model is wrapped"
    )


def separate_step_counts(entries: Sequence[HeldParameter], state: Mapping[Tensor, Any]) -> None:
    """Give every flat tensor its own count of steps.

    DeepSpeed 0.19.8 gives all sub-groups the same tensor when it loads a universal checkpoint at stage 3: it would be
    counted up by each of them.
    """
    for holder in {entry.holder for entry in entries if entry.flat}:
        own = state.get(holder, {})
        if isinstance(own.get("step"), Tensor):
            own["step"] = own["step"].clone()


def _steps(state: Mapping[Tensor, Any], holder: Tensor) -> float:
    """Steps that the base optimizer has made with ``holder``, as far as it says."""
    steps = state.get(holder, {}).get("step", 0)
    return float(steps)
