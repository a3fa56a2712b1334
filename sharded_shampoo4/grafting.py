"""Grafting: directions take the norms of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .labels import label
from .plan import Owned, Plan
from .preconditioner import Matrix, index_tensor
from .ranks import Company, Ranks

_SMALL, _LARGE = 1e-12, 1e18  # norms of blocks between which the squares of float32 rows are exact enough


class Grafting:
    """One step's norms, and what follows from them (Algorithm 4, step 4).

    Every block's squared norms are kept apart until all ranks have theirs, and then added up in the order of the
    blocks: the sums do not depend on who owns what.
    """

    def __init__(self, plan: Plan, matrices: Sequence[Matrix]) -> None:
        self._matrices = matrices
        self._block_index = {owned: index for index, owned in enumerate(plan.blocks)}
        self._matrix_of_block = [owned.matrix for owned in plan.blocks]
        self._squares: Tensor | None = None  # (blocks, 2): of gradients and of directions

    def begin(self) -> None:
        """Start a step."""
        self._squares = None

    def note(self, members: Sequence[Owned], gradients: Tensor, directions: Tensor) -> None:
        """Graft ``directions`` (k, m, n) of blocks with equal options at once, or remember their norms."""
        scope = self._matrices[members[0].matrix].options.grafting
        if scope == "none":
            return
        with label("graft"):
            norms = torch.stack([block_norms(gradients), block_norms(directions)], dim=1)
            if scope == "block":
                directions.mul_(_ratio(norms).to(directions.dtype).view(-1, 1, 1))
                return
            squares = self._all_squares()
            indices = index_tensor([self._block_index[owned] for owned in members], squares.device)
            squares.index_copy_(0, indices, norms.square().to(squares.device))

    def targets(self, shards: Sequence[Tensor], directed: Sequence[bool]) -> list[Tensor]:
        """Where directions are to be written: into the gradients, but into float32 vectors beside low-precision ones.

        A direction is rounded to the type of its gradient once, after it has been scaled.
        """
        grafted = set(self._grafted(directed))
        return [
            torch.empty_like(shard, dtype=torch.float32) if index in grafted and _is_low_precision(shard) else shard
            for index, shard in enumerate(shards)
        ]

    def apply(
        self,
        shards: Sequence[Tensor],
        targets: Sequence[Tensor],
        directed: Sequence[bool],
        ranks: Ranks,
        company: Company,
    ) -> None:
        """Scale the directions in this rank's ``targets`` and leave them in its ``shards``.

        What fails is kept in ``company``.
        """
        grafted = self._grafted(directed)
        if not grafted:
            return
        with label("graft"):
            squares = company.buffer(self._all_squares)
            ranks.sum(squares)
            company.attempt(self._scale, shards, targets, grafted, squares)

    def _scale(
        self, shards: Sequence[Tensor], targets: Sequence[Tensor], grafted: Sequence[int], squares: Tensor
    ) -> None:
        sums = torch.zeros(len(self._matrices), 2, dtype=torch.float64, device=squares.device)
        sums.index_add_(0, index_tensor(self._matrix_of_block, squares.device), squares)
        exact = _ratio(sums.sqrt())
        ratios = {dtype: exact.to(dtype).unbind() for dtype in {self._matrices[index].dtype for index in grafted}}
        for index in grafted:
            shard, target = shards[index], targets[index]
            ratio = ratios[self._matrices[index].dtype][index].to(shard.device)
            if target is shard:
                shard.mul_(ratio)
            else:
                shard.copy_(target.mul_(ratio))

    def _grafted(self, directed: Sequence[bool]) -> list[int]:
        """The matrices whose directions take the norm of the parameter's whole gradient."""
        return [
            index
            for index, (matrix, is_directed) in enumerate(zip(self._matrices, directed, strict=True))
            if is_directed and matrix.options.grafting == "parameter"
        ]

    def _all_squares(self) -> Tensor:
        if self._squares is None:
            device = self._matrices[0].device
            self._squares = torch.zeros(len(self._block_index), 2, dtype=torch.float64, device=device)
        return self._squares


def _is_low_precision(shard: Tensor) -> bool:
    return shard.dtype not in (torch.float32, torch.float64)


def _ratio(norms: Tensor) -> Tensor:
    """Factors that give directions the norms of their gradients; ``norms`` (k, 2) of gradients and directions."""
    return norms[:, 0] / (norms[:, 1] + 1e-12)


def block_norms(blocks: Tensor) -> Tensor:
    """Frobenius norms of (k, m, n) ``blocks``, float64 (k,).

    Rows first: so they do not depend on the number of blocks. On a CPU rows in the blocks' own type, which is three
    times as fast, but for blocks so large or small that squares of float32 values have no room.
    """
    if blocks.device.type != "cpu":
        return _exact_norms(blocks)
    norms: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(blocks, dim=2), dim=1, dtype=torch.float64)
    extreme = ~((norms > _SMALL) & (norms < _LARGE))  # also what is not finite
    if extreme.any():
        norms[extreme] = _exact_norms(blocks[extreme])
    return norms


def _exact_norms(blocks: Tensor) -> Tensor:
    of_rows = torch.linalg.vector_norm(blocks, dim=2, dtype=torch.float64)
    norms: Tensor = torch.linalg.vector_norm(of_rows, dim=1)
    return norms
