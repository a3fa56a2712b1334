"""Checks that all ranks have the same optimizer: the same groups, the same base, the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from .comm.ranks import OWN_MODELS, Ranks
from .numerics.matrix import Matrix
from .options import OPTION_NAMES
from .planning.shards import Shard
from .report import shorten

_WAYS_OUT = (
    f"{OWN_MODELS}; torch's ZeroRedundancyOptimizer, which gives every rank some parameters, takes "
    "optimizer_class=functools.partial(Shampoo4, process_group='alone')"
)


def check_groups(ranks: Ranks, base: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError, on every rank alike, unless all have the same base optimizer, groups and options of the base.

    Args:
        ranks: that must agree; the call is collective.
        base: name of the base optimizer.
        groups: the optimizer's param groups.
    """
    first, *others = ranks.gather([{"base": base, **_base_options(group)} for group in groups])
    for rank, theirs in enumerate(others, 1):
        if len(theirs) != len(first):
            found = f"{len(first)} param groups on rank 0 and {len(theirs)} on rank {rank}"
            raise ValueError(f"there are {found}; {OWN_MODELS}")
        for number, (group, other) in enumerate(zip(first, theirs, strict=True)):
            for option in {**group, **other}:  # in the same order on every rank
                value, another = group.get(option), other.get(option)
                if value != another:
                    found = f"{value!r} on rank 0 and {another!r} on rank {rank}"
                    raise ValueError(f"{option} of param group {number} is {found}; {OWN_MODELS}")


def gather_shards(ranks: Ranks, matrices: Sequence[Matrix], shards: Sequence[Shard]) -> list[list[Shard]]:
    """Return every rank's shards of ``matrices``, by ranks, if all ranks precondition the same; collective.

    Args:
        ranks: that must agree.
        matrices: in an order that must be the same on every rank.
        shards: this rank's, in the same order.

    Raises:
        ValueError: on every rank alike, if ranks precondition different parameters, or with different options.
    """
    pairs = zip(matrices, shards, strict=True)
    everyone = ranks.gather([(*_describe(matrix), shard) for matrix, shard in pairs])
    _check_matrices(everyone)
    return [[shard for *_, shard in described] for described in everyone]


def _check_matrices(everyone: Sequence[Sequence[tuple[str, tuple[int, int], dict[str, Any], Shard]]]) -> None:
    first, *others = everyone
    names = [name for name, *_ in first]
    for rank, other in enumerate(others, 1):
        theirs = [name for name, *_ in other]
        if theirs != names:
            raise ValueError(
                f"ranks precondition different parameters: rank 0 {len(names)} ({shorten(names)}), "
                f"rank {rank} {len(theirs)} ({shorten(theirs)}): they must give Shampoo4 the same ones in the same "
                f"order. It spreads its work by itself; {_WAYS_OUT}"
            )
        for (name, shape, options, _), (_, other_shape, other_options, _) in zip(first, other, strict=True):
            if shape != other_shape:
                raise ValueError(
                    f"{name} has shape {shape} on rank 0 and {other_shape} on rank {rank}, but ranks must have the "
                    f"same parameters: {_WAYS_OUT}"
                )
            for option, value in options.items():
                if other_options[option] != value:
                    raise ValueError(
                        f"{option} of {name} is {value!r} on rank 0 and {other_options[option]!r} on rank {rank}; "
                        f"{OWN_MODELS}"
                    )


def _base_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a group that are not about the preconditioner, as plain values."""
    own = {*OPTION_NAMES, "params", "param_names"}
    plain = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items() if k not in own}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, tuple))}


def _describe(matrix: Matrix) -> tuple[str, tuple[int, int], dict[str, Any]]:
    arithmetic = {"device": matrix.device.type, "dtype": str(matrix.dtype)}
    return matrix.name, matrix.shape, {**asdict(matrix.options), **arithmetic}
