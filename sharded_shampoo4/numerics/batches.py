"""Equal-shaped blocks of one owner, which take their steps together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..context import tf32_products
from ..planning.plan import Owned
from . import linalg
from .factors import FactorPool
from .moments import MomentPool, Turn
from .pool import Index

Sides = tuple[list[int], list[int]]  # which of some blocks' left factors, and which of their right factors


class Refreshed(NamedTuple):
    """What a refresh leaves for the directions of the same step: bases, eigenvectors as rows, and moments."""

    left: Tensor | None  # (k, rows, rows)
    right: Tensor | None  # (k, columns, columns)
    moments: tuple[Tensor, Tensor]  # (k, rows, columns)


class BlockBatch:
    """Equal-shaped blocks whose left factors are neighbors in one pool and right factors in another (or the same).

    Args:
        members: the blocks.
        left, right: the pool of their factors on this side and the place of the first; None if they have none there.
        moments: of the blocks, with method="soap".
    """

    def __init__(
        self,
        members: list[Owned],
        left: tuple[FactorPool, int] | None,
        right: tuple[FactorPool, int] | None,
        moments: MomentPool | None,
    ) -> None:
        self.members = members
        self.moments = moments
        self._sides = (left, right)
        self._whole = [None if side is None else slice(side[1], side[1] + len(members)) for side in self._sides]
        (pool, _), *_ = filter(None, self._sides)
        self._options, self._device = pool.options, pool.device

    @property
    def _is_shared(self) -> bool:
        """Whether the factors of both sides are in one pool."""
        left, right = self._sides
        return left is not None and right is not None and left[0] is right[0]

    @property
    def roots_are_fresh(self) -> tuple[bool, bool]:
        """Whether inverse roots of the left and right factors can be computed by :meth:`absorb`."""
        left, right = (side is not None and side[0].roots_are_fresh for side in self._sides)
        return left, right

    def absorb(
        self, chosen: Sequence[int], due: Sides, gradients: Tensor, *, with_roots: bool = False
    ) -> Refreshed | None:
        """Statistics step of those of the ``chosen`` members that are ``due``, by sides, perhaps with inverse roots.

        ``gradients`` (k, rows, columns) are those of the chosen ones. Moments follow their bases: the new ones are
        returned then.
        """
        found = self._due(chosen, due)
        own = _some(gradients, due[0]), _some(gradients, due[1]).mT  # a factor's own side first
        if self.moments is not None:
            return self._turn(self.moments, chosen, due, found, own)
        if self._is_shared:
            where = torch.cat([places for _, places in found.values()])
            found[0][0].absorb(where, torch.cat(own), with_roots=with_roots)
        else:
            for side, (pool, where) in found.items():
                pool.absorb(where, own[side], with_roots=with_roots)
        return None

    def _turn(
        self,
        moments: MomentPool,
        chosen: Sequence[int],
        due: Sides,
        found: dict[int, tuple[FactorPool, Tensor]],
        gradients: tuple[Tensor, Tensor],
    ) -> Refreshed:
        """Absorb gradients into blocks that have moments, and express these in the new bases.

        ``gradients`` has one tensor for each side, (k, n, any), where n is the order of that side's factors.
        """
        dtype = gradients[0].dtype
        bases = {side: basis for side, basis in enumerate(self.bases(chosen, dtype)) if basis is not None}
        turned = {side: _some(basis, due[side]) for side, basis in bases.items()}
        if self._is_shared:
            where, both = torch.cat([places for _, places in found.values()]), torch.cat([turned[0], turned[1]])
            each = [len(due[0]), len(due[1])]
            rotations = dict(enumerate(found[0][0].turn(where, torch.cat(gradients), both).split(each)))
            turned = dict(enumerate(both.split(each)))
        else:
            rotations = {side: pool.turn(where, gradients[side], turned[side]) for side, (pool, where) in found.items()}
        turns = []
        for side, rotation in rotations.items():
            if due[side]:
                places, is_whole = index_tensor(due[side], self._device), len(due[side]) == len(chosen)
                bases[side] = turned[side] if is_whole else bases[side].index_copy_(0, places, turned[side])
                turns.append(Turn(side, places, rotation))
        return Refreshed(bases.get(0), bases.get(1), moments.rotate(self._run(chosen), turns, dtype))

    def invert(self, chosen: Sequence[int], due: Sides) -> None:
        """Root step of those of the ``chosen`` members that are ``due``, by sides."""
        found = self._due(chosen, due)
        if self._is_shared:
            found[0][0].invert(torch.cat([where for _, where in found.values()]))
            return
        for pool, where in found.values():
            pool.invert(where)

    def precondition(self, chosen: Sequence[int], gradients: Tensor, refreshed: Refreshed | None) -> Tensor:
        """Directions of the ``chosen`` members, before grafting: (k, rows, columns).

        L^(-1/4) G R^(-1/4), or with factors on one side only L^(-1/2) G or G R^(-1/2). With moments V_L X V_R^T, where
        X is what Adam makes of V_L^T G V_R; a side without factors has no V.

        ``refreshed`` is what :meth:`absorb` has returned in this step, if it was called.
        """
        in_bfloat16 = self._options.matmul_dtype == "bfloat16" and gradients.dtype == torch.float32
        dtype = torch.bfloat16 if in_bfloat16 else gradients.dtype
        if self.moments is None:
            found = gradients.to(dtype)
            for number, (side, where) in enumerate(zip(self._sides, self._places(chosen), strict=True)):
                if side is not None and where is not None:
                    root = side[0].root(where, dtype)
                    with self._products():
                        found = root.right_of(found) if number else root.left_of(found)
            return found.to(gradients.dtype)
        bases = refreshed[:2] if refreshed else self.bases(chosen, dtype)
        left, right = (None if basis is None else basis.to(dtype) for basis in bases)
        with self._products():
            projected = _between(left, gradients.to(dtype), None if right is None else right.mT).to(gradients.dtype)
        moments = refreshed.moments if refreshed else None
        directions = self.moments.direct(self._run(chosen), projected, moments).to(dtype)
        with self._products():
            return _between(None if left is None else left.mT, directions, right).to(gradients.dtype)

    def _products(self) -> contextlib.AbstractContextManager[None]:
        """A context for the products that ``matmul_dtype`` is about."""
        return tf32_products() if self._options.matmul_dtype == "tf32" else contextlib.nullcontext()

    def bases(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The rectified eigenbases of the ``chosen`` members, (k, rows, rows) and (k, columns, columns).

        Eigenvectors are rows, as they are stored.
        """
        left, right = (
            None if side is None or where is None else side[0].basis(where, dtype)
            for side, where in zip(self._sides, self._places(chosen), strict=True)
        )
        return left, right

    def _due(self, chosen: Sequence[int], due: Sides) -> dict[int, tuple[FactorPool, Tensor]]:
        """By sides, the pool of the factors that are due, and their places in it; of both sides if they share one."""
        found = {}
        for number, (side, which) in enumerate(zip(self._sides, due, strict=True)):
            if side is not None and (which or self._is_shared):
                found[number] = side[0], index_tensor([chosen[k] for k in which], self._device) + side[1]
        return found

    def _places(self, chosen: Sequence[int]) -> Sequence[Index | None]:
        """The places of the chosen members' factors in the pools: slices, which make views, where all are chosen."""
        if len(chosen) == len(self.members):
            return self._whole
        positions = index_tensor(chosen, self._device)
        return [None if side is None else positions + side[1] for side in self._sides]

    def _run(self, chosen: Sequence[int]) -> Index:
        """The places of the chosen members' moments."""
        everyone = len(chosen) == len(self.members)
        return slice(0, len(self.members)) if everyone else index_tensor(chosen, self._device)


def _between(left: Tensor | None, blocks: Tensor, right: Tensor | None) -> Tensor:
    """``left`` (k, m, m) times ``blocks`` (k, m, n) times ``right`` (k, n, n); None stands for the identity."""
    found = blocks if left is None else linalg.matmul(left, blocks)
    return found if right is None else linalg.matmul(found, right)


def _some(gradients: Tensor, which: Sequence[int]) -> Tensor:
    return gradients if len(which) == len(gradients) else gradients[index_tensor(which, gradients.device)]


def index_tensor(positions: Sequence[int], device: torch.device) -> Tensor:
    """``positions`` on ``device``; remembered, so that steps that are alike copy nothing from the host."""
    return _index_tensor(tuple(positions), device)


@functools.lru_cache(maxsize=2**14)
def _index_tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64, device=device)
