"""Warnings about options that are allowed, but hardly meant: costly factors, stacks of matrices, long intervals."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from .numerics.matrix import COSTLY_BYTES, Matrix
from .options import PreconditionerOptions
from .planning.schedule import first_root
from .report import format_bytes, warn
from .values import to_integer

# The factors of costly parameters are worth a warning if together they take at least so many bytes, and at least so
# large a share of what all parameters and factors take. The head of a classifier of ten classes does not.
_LEAST_BYTES = 2**20
_LEAST_SHARE = 0.02
_SHOWN = 3


@dataclass(frozen=True)
class Given:
    """A parameter that is trained, as it was given: its name, whole shape, bytes per element and options."""

    name: str
    shape: torch.Size
    itemsize: int
    options: PreconditionerOptions

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter itself."""
        return self.shape.numel() * self.itemsize

    def matrix(self, limit: int | None = None) -> Matrix | None:
        """Its matrix, in blocks of at most ``limit``; None if it is not preconditioned."""
        options = self.options if limit is None else replace(self.options, max_preconditioner_dim=limit)
        return _matrix(self.name, tuple(self.shape), options)


@functools.lru_cache(maxsize=4096)
def _matrix(name: str, shape: tuple[int, ...], options: PreconditionerOptions) -> Matrix | None:
    return Matrix.of(name, shape, options, torch.device("meta"))


class Advice:
    """Warnings about an optimizer's parameters and options, each of them given once.

    Attributes:
        total_steps: length of the training, once it is known.
    """

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = None if total_steps is None else int(to_integer(total_steps))
        self._chose_intervals = total_steps is not None
        self._told: set[Hashable] = set()

    def give(self, parameters: Sequence[Given]) -> None:
        """Warn of what is new in ``parameters``, which are all of the optimizer's."""
        topics = (self._on_intervals, self._on_costs, self._on_length)
        for message in [message for topic in topics for message in topic(parameters)]:
            warn(message)

    def _on_intervals(self, parameters: Sequence[Given]) -> Iterable[str]:
        rooted = [g.options for g in parameters if g.matrix() and g.options.method == "shampoo"]
        intervals = {(options.statistics_interval, options.root_interval) for options in rooted}
        for statistics, root in sorted(intervals):
            if statistics > root and self._is_new((statistics, root)):
                yield (
                    f"statistics_interval={statistics} is larger than root_interval={root}: until step {statistics} "
                    "inverse roots are those of the initial statistics, which no gradient has entered, and directions "
                    "are plain gradients; later ones are recomputed from statistics that have not changed. Make "
                    "statistics_interval at most root_interval"
                )

    def _on_length(self, parameters: Sequence[Given]) -> Iterable[str]:
        first, steps = max((first_root(g.options) for g in parameters if g.matrix()), default=0), self.total_steps
        if steps is not None and steps < 2 * first and self._is_new(("length", steps, first)):
            chosen = "" if self._chose_intervals else f"total_steps={steps}, which chooses the intervals, or "
            share = f"only from step {first} on" if first <= steps else "in no step"
            yield (
                f"this run has {steps} steps, and directions are preconditioned {share}: before, the base optimizer "
                f"works on plain gradients. Give {chosen}a smaller root_interval, or leave interval_warmup=True"
            )

    def _on_costs(self, parameters: Sequence[Given]) -> Iterable[str]:
        matrices = [(g, matrix) for g in parameters if (matrix := g.matrix())]
        costly = [(g, matrix) for g, matrix in matrices if matrix.is_costly]
        total = sum(matrix.factor_bytes for _, matrix in costly)
        everything = sum(g.nbytes for g in parameters) + sum(matrix.nbytes for _, matrix in matrices)
        if total < max(_LEAST_BYTES, _LEAST_SHARE * everything):
            return
        if not any([self._is_new(("cost", g.name)) for g, _ in costly]):
            return
        costly.sort(key=lambda pair: -pair[1].nbytes)
        yield (
            f"the factors of {len(costly)} of {len(parameters)} parameters take {format_bytes(total)}, and the "
            f"parameters themselves {format_bytes(sum(g.nbytes for g, _ in costly))}: "
            f"{_few([_cost(g, matrix) for g, matrix in costly])}. A factor is as large as the square of a side, and "
            "here one side is short and the other long. Give their group another max_aspect, which leaves the long "
            "side without factors, or a smaller max_preconditioner_dim; or leave them to the base optimizer, in a "
            "param group with precondition=False"
        )

    def _is_new(self, what: Hashable) -> bool:
        new = what not in self._told
        self._told.add(what)
        return new


def _cost(given: Given, matrix: Matrix) -> str:
    """What a parameter's factors cost, and a smaller limit of blocks with which they would not."""
    found = (
        f"{given.name} {tuple(given.shape)} has {format_bytes(matrix.factor_bytes)} of factors for "
        f"{format_bytes(given.nbytes)} of values ({matrix.bytes_per_element:.0f} bytes per element"
    )
    limit = matrix.options.max_preconditioner_dim
    while limit > 1:
        limit //= 2
        smaller = given.matrix(limit)
        if smaller and smaller.bytes_per_element <= COSTLY_BYTES:
            return f"{found}; {smaller.bytes_per_element:.0f} with max_preconditioner_dim={limit})"
    return f"{found})"


def _few(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
