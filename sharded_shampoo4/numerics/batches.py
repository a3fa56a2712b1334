"""Equal-shaped blocks of one owner, which take their steps together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.plan import Owned
from . import linalg
from .factors import FactorPool
from .moments import MomentPool, Turn
from .pool import Index

Sides = tuple[list[int], list[int]]  # which of some blocks' left factors, and which of their right factors


class Refreshed(NamedTuple):
    """What a refresh leaves for the directions of the same step: bases, eigenvectors as columns, and moments."""

    left: Tensor  # (k, rows, rows)
    right: Tensor  # (k, columns, columns)
    moments: tuple[Tensor, Tensor]  # (k, rows, columns)


class BlockBatch:
    """Equal-shaped blocks whose left factors are neighbors in one pool and right factors in another (or the same).

    ``moments`` are those of the blocks, with method="soap".
    """

    def __init__(
        self,
        members: list[Owned],
        left: FactorPool,
        left_start: int,
        right: FactorPool,
        right_start: int,
        moments: MomentPool | None,
    ) -> None:
        self.members = members
        self.left, self.left_start = left, left_start
        self.right, self.right_start = right, right_start
        self.moments = moments
        self._whole = (
            slice(left_start, left_start + len(members)),
            slice(right_start, right_start + len(members)),
        )

    def absorb(self, chosen: Sequence[int], due: Sides, gradients: Tensor) -> Refreshed | None:
        """Statistics step of those of the ``chosen`` members that are ``due``, by sides.

        ``gradients`` (k, rows, columns) are those of the chosen ones. Moments follow their bases: the new ones are
        returned then.
        """
        left, right = self._due(chosen, due)
        of_left, of_right = (_some(gradients, which) for which in due)
        old: list[Tensor] | None = None  # bases of the factors that are due
        if self.moments is not None:
            old = [_some(side, which) for side, which in zip(self.bases(chosen, gradients.dtype), due, strict=True)]
        changed: list[Tensor | None] = [None, None]
        if self.left is self.right:
            where, gradients_of_both = torch.cat([left, right]), torch.cat([of_left, of_right.mT])
            both = self.left.absorb(where, gradients_of_both, torch.cat(old) if old else None)
            changed = list(both.split([len(left), len(right)]))
        else:
            if due[0]:
                changed[0] = self.left.absorb(left, of_left, old[0] if old else None)
            if due[1]:
                changed[1] = self.right.absorb(right, of_right.mT, old[1] if old else None)
        if self.moments is None or old is None:
            return None
        new = self.bases(chosen, gradients.dtype)
        turns = [
            Turn(side, index_tensor(which, gradients.device), old[side], _some(new[side], which), kept)
            for side, (which, kept) in enumerate(zip(due, changed, strict=True))
            if kept is not None and which
        ]
        return Refreshed(*new, self.moments.rotate(self._run(chosen), turns, gradients.dtype))

    def invert(self, chosen: Sequence[int], due: Sides) -> None:
        """Root step of those of the ``chosen`` members that are ``due``, by sides."""
        left, right = self._due(chosen, due)
        if self.left is self.right:
            self.left.invert(torch.cat([left, right]))
            return
        if due[0]:
            self.left.invert(left)
        if due[1]:
            self.right.invert(right)

    def precondition(self, chosen: Sequence[int], gradients: Tensor, refreshed: Refreshed | None) -> Tensor:
        """Directions of the ``chosen`` members, before grafting: (k, rows, columns).

        L^(-1/4) G R^(-1/4), or with moments V_L X V_R^T, where X is what Adam makes of V_L^T G V_R.
        ``refreshed`` is what :meth:`absorb` has returned in this step, if it was called.
        """
        dtype = getattr(torch, self.left.options.matmul_dtype) if gradients.dtype == torch.float32 else gradients.dtype
        if self.moments is None:
            left, right = self._runs(chosen)
            half = self.left.root(left, dtype).left_of(gradients.to(dtype))
            return self.right.root(right, dtype).right_of(half).to(gradients.dtype)
        bases = refreshed[:2] if refreshed else self.bases(chosen, gradients.dtype)
        left_basis, right_basis = (basis.to(dtype) for basis in bases)
        projected = linalg.matmul(linalg.matmul(left_basis.mT, gradients.to(dtype)), right_basis).to(gradients.dtype)
        moments = refreshed.moments if refreshed else None
        directions = self.moments.direct(self._run(chosen), projected, moments).to(dtype)
        return linalg.matmul(linalg.matmul(left_basis, directions), right_basis.mT).to(gradients.dtype)

    def bases(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rectified eigenbases of the ``chosen`` members, (k, rows, rows) and (k, columns, columns)."""
        left, right = self._runs(chosen)
        return self.left.basis(left, dtype), self.right.basis(right, dtype)

    def _due(self, chosen: Sequence[int], due: Sides) -> tuple[Tensor, Tensor]:
        """The places in the pools of the left and the right factors that are due."""
        left, right = (index_tensor([chosen[k] for k in which], self.left.device) for which in due)
        return left + self.left_start, right + self.right_start

    def _positions(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions = index_tensor(chosen, self.left.device)
        return positions + self.left_start, positions + self.right_start

    def _runs(self, chosen: Sequence[int]) -> tuple[Index, Index]:
        """Like :meth:`_positions`, but as slices where all members are chosen: views instead of copies."""
        return self._positions(chosen) if len(chosen) < len(self.members) else self._whole

    def _run(self, chosen: Sequence[int]) -> Index:
        """The places of the chosen members' moments."""
        everyone = len(chosen) == len(self.members)
        return slice(0, len(self.members)) if everyone else index_tensor(chosen, self.left.device)


def _some(gradients: Tensor, which: Sequence[int]) -> Tensor:
    return gradients if len(which) == len(gradients) else gradients[index_tensor(which, gradients.device)]


def index_tensor(positions: Sequence[int], device: torch.device) -> Tensor:
    """``positions`` on ``device``; remembered, so that steps that are alike copy nothing from the host."""
    return _index_tensor(tuple(positions), device)


@functools.lru_cache(maxsize=2**14)
def _index_tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64, device=device)
