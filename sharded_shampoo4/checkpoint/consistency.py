"""Checks that all ranks save, or load, the same: of what they have gathered of each other, so that all raise alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ..report import shorten


class Arguments(NamedTuple):
    """What a call was given, beside the optimizer and the directory."""

    model: bool  # whether there is one
    frozen: bool


class Seen(NamedTuple):
    """What a rank sees where it is told to load from.

    Attributes:
        arguments: of its call.
        data: the folder with the data. Its name is that of one save.
        file: equal for ranks that see the same files, different where they see copies.
    """

    arguments: Arguments
    data: Path
    file: tuple[int, ...]


def check_arguments(everyone: Sequence[Arguments]) -> None:
    """Raise ValueError, naming the argument, if ranks were given different ones."""
    with_model, frozen = ([bool(flag) for flag in flags] for flags in zip(*everyone, strict=True))
    if len(set(with_model)) > 1:
        given, missing = _parted(with_model)
        raise ValueError(f"model= was given on {given}, but not on {missing}: give it on every rank, or on none")
    if len(set(frozen)) > 1:
        given, missing = _parted(frozen)
        raise ValueError(f"frozen= is True on {given}, but False on {missing}: give the same on every rank")


def check_trained(everyone: Sequence[Collection[str]]) -> None:
    """Raise ValueError, naming a parameter, unless all ranks train the same; ``everyone`` are names, by ranks."""
    mixed = set[str]().union(*everyone).difference(set(everyone[0]).intersection(*everyone))
    if mixed:
        name = min(mixed)
        having, lacking = _parted([name in names for names in everyone])
        raise ValueError(
            f"{name} is trained on {having}, but not on {lacking}: freeze the same parameters on every rank, and give "
            "the same to the optimizer"
        )


def check_seen(everyone: Sequence[Seen]) -> None:
    """Raise ValueError, naming two ranks, unless all load the same with the same arguments."""
    check_arguments([seen.arguments for seen in everyone])
    first = everyone[0].data
    for rank, seen in enumerate(everyone):
        if seen.data.name != first.name:
            raise ValueError(f"ranks load different checkpoints: rank 0 has {first}, rank {rank} has {seen.data}")


def own_share(everyone: Sequence[Seen], rank: int) -> slice:
    """Return the slice of its files that a rank checks. Ranks that read the same files divide them among themselves."""
    mates = [mate for mate, seen in enumerate(everyone) if seen.file == everyone[rank].file]
    return slice(mates.index(rank), None, len(mates))


def _parted(flags: Sequence[bool]) -> tuple[str, str]:
    """The ranks that have a flag set, and the others, in words."""
    having, lacking = ([rank for rank, flag in enumerate(flags) if flag == kind] for kind in (True, False))
    return f"rank(s) {shorten(having)}", f"rank(s) {shorten(lacking)}"
