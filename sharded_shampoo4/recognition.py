"""Parameters as an optimizer was given them, and how they are recognized in what hosts have put into the groups."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .report import shorten

Reference = Callable[[], Tensor | None]


def refer_to(parameter: Tensor, stays: bool) -> Reference:
    """A reference to a parameter. It keeps alive one that ``stays``, and not one that a host may replace and free.

    torch does not swap tensors that have weak references, as ``model.cpu()`` and ``model.float()`` do under FSDP2.
    """
    return (lambda: parameter) if stays else weakref.ref(parameter)


def is_trained(parameter: Tensor) -> bool:
    """Whether a parameter takes part in the training: it is not frozen, or has a gradient all the same."""
    return parameter.requires_grad or parameter.grad is not None


@dataclass(eq=False)
class Member:
    """A parameter as it was given."""

    name: str  # without what wrappers put into names
    named: bool  # by whoever made the optimizer, or by DeepSpeed's engine
    given: Reference
    held: Reference  # what stands in the group: the one that was given, or one that replaced it
    shape: torch.Size
    was_trained: bool  # when it was given
    plain: str | None = None  # its name in the model, once that is known
    label: str = ""  # for messages: the name, made different from all others

    @property
    def is_trained(self) -> bool:
        """Whether it takes part in the training now."""
        held = self.held()
        return self.was_trained if held is None else is_trained(held)


@dataclass
class MemberGroup:
    """One group and the parameters in it."""

    group: dict[str, Any]
    members: list[Member]
    options: dict[str, Any]  # when the group was added, without learning rate and the like

    def parameters(self) -> list[Tensor]:
        """Those that were given and are still there."""
        return [parameter for parameter in (member.given() for member in self.members) if parameter is not None]

    def trained_shapes(self, now: bool) -> Iterator[tuple[str, torch.Size]]:
        """Yield the name and whole shape of each parameter that is trained.

        Args:
            now: whether it is trained now; else, whether it was when it was given.
        """
        return (
            (member.label, member.shape)
            for member in self.members
            if (member.is_trained if now else member.was_trained)
        )

    def is_in_place(self, params: Sequence[Tensor]) -> bool:
        """Whether ``params`` are the ones that were given or, if they were replaced, those seen last."""
        return len(params) == len(self.members) and all(
            member.held() is parameter for member, parameter in zip(self.members, params, strict=True)
        )


def recognize(
    params: Sequence[Tensor],
    number: int,
    before: MemberGroup | None,
    known: Mapping[Tensor, Member],
    standing: set[int],
) -> list[Member]:
    """The members that ``params``, in group ``number``, are: by identity, and by order and shape where replaced.

    ``before`` is what the group was, ``standing`` the ids of all members that stand in some group as they are.
    """
    found = [known.get(parameter) for parameter in params]
    new = [parameter for parameter, member in zip(params, found, strict=True) if member is None]
    if not new:
        return [member for member in found if member is not None]
    if before is None:
        raise ValueError(f"param group {number} is none of those that Shampoo4 was given: use add_param_group()")
    free = [member for member in before.members if id(member) not in standing]
    if not free:
        raise ValueError(f"param group {number} has a parameter that it was not given: use add_param_group()")
    for chosen in (free, [member for member in free if _was_given_unfrozen(member)]):
        if [member.shape for member in chosen] == [parameter.shape for parameter in new]:
            replaced = iter(chosen)
            members = [member or next(replaced) for member in found]
            places = [before.members.index(member) for member in members if member in before.members]
            if places == sorted(places):
                return members
    raise ValueError(
        f"param group {number} was given {len(before.members)} parameters of shapes "
        f"{shorten(tuple(member.shape) for member in before.members)} and now has {len(params)} of shapes "
        f"{shorten(tuple(parameter.shape) for parameter in params)}: no telling which is which"
    )


def _was_given_unfrozen(member: Member) -> bool:
    parameter = member.given()
    return parameter is not None and bool(parameter.requires_grad)


def lasting_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options without those that schedulers change."""
    return {
        k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr", "momentum", "betas")
    }
