"""Grafting: directions take the norms of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from .comm.ranks import DeferredErrors, Ranks
from .labels import label
from .numerics.batches import index_tensor
from .numerics.matrix import Matrix
from .planning.plan import Plan

_SMALL, _LARGE = 1e-12, 1e18  # norms of blocks between which the squares of float32 rows are exact enough


class Grafting:
    """One step's norms, and what follows from them (Algorithm 4, step 4).

    Every block's squared norms are kept apart until all ranks have theirs, and then added up in the order of the
    blocks: the sums do not depend on who owns what. A parameter that is several matrices has a sum for each of them.
    """

    def __init__(self, plan: Plan, matrices: Sequence[Matrix], rank: int) -> None:
        self._matrices = matrices
        self._matrix_of_block = [owned.matrix for owned in plan.blocks]
        *starts, self._sums = accumulate((len(matrix.edges) - 1 for matrix in matrices), initial=0)
        self._sum_of_block = [start + unit for start, m in zip(starts, matrices, strict=True) for unit in m.units]
        # For each parameter: numbers of sums, and where in this rank's shard the matrices with these sums are.
        self._spans: list[list[tuple[int, slice]]] = []
        for start, matrix, planned in zip(starts, matrices, plan.matrices, strict=True):
            places = pairwise(map(planned.shards[rank].before, matrix.edges))
            self._spans.append([(start + k, slice(a, b)) for k, (a, b) in enumerate(places) if a < b])
        # Numbers of blocks, and their norms: of gradients and of directions.
        self._noted: list[tuple[tuple[int, ...], Tensor, Tensor]] = []

    def begin(self) -> None:
        """Start a step."""
        self._noted = []

    def note(self, blocks: tuple[int, ...], gradients: Tensor, directions: Tensor) -> None:
        """Graft directions at once, or remember their norms.

        Args:
            blocks: the numbers in the plan of blocks with equal options.
            gradients: (blocks, rows, columns).
            directions: (blocks, rows, columns); scaled in place if they are grafted by block.
        """
        scope = self._matrices[self._matrix_of_block[blocks[0]]].grafting
        if scope == "none":
            return
        with label("graft"):
            norms = block_norms(gradients), block_norms(directions)
            if scope == "block":
                directions.mul_(_ratio(*norms).to(directions.dtype).view(-1, 1, 1))
            else:
                self._noted.append((blocks, *norms))

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
        errors: DeferredErrors,
    ) -> None:
        """Scale the directions in this rank's ``targets`` and leave them in its ``shards``.

        What fails is kept in ``errors``.
        """
        grafted = self._grafted(directed)
        if not grafted:
            return
        with label("graft"):
            squares = errors.buffer(self._no_squares)
            errors.attempt(self._square, squares)
            ranks.sum(squares)
            errors.attempt(self._scale, shards, targets, grafted, squares)

    def _scale(
        self, shards: Sequence[Tensor], targets: Sequence[Tensor], grafted: Sequence[int], squares: Tensor
    ) -> None:
        sums = torch.zeros(self._sums, 2, dtype=torch.float64, device=squares.device)
        sums.index_add_(0, index_tensor(self._sum_of_block, squares.device), squares)
        exact = _ratio(*sums.sqrt().unbind(1))
        kinds = {(self._matrices[index].dtype, shards[index].device) for index in grafted}
        ratios = {kind: exact.to(kind[0]).to(kind[1]).unbind() for kind in kinds}
        held = [index for index in grafted if shards[index].numel()]
        if not held:
            return
        scaled, by = [], []
        for index in held:
            ratio, spans = ratios[self._matrices[index].dtype, shards[index].device], self._spans[index]
            target = targets[index] if len(spans) == 1 else targets[index].view(-1)
            scaled += [target] if len(spans) == 1 else [target[place] for _, place in spans]
            by += [ratio[number] for number, _ in spans]
        torch._foreach_mul_(scaled, by)
        rounded = [index for index in held if targets[index] is not shards[index]]
        if rounded:
            torch._foreach_copy_([shards[index] for index in rounded], [targets[index] for index in rounded])

    def _grafted(self, directed: Sequence[bool]) -> list[int]:
        """The matrices whose directions take the norm of the parameter's whole gradient."""
        return [
            index
            for index, (matrix, is_directed) in enumerate(zip(self._matrices, directed, strict=True))
            if is_directed and matrix.grafting == "parameter"
        ]

    def _no_squares(self) -> Tensor:
        device = self._matrices[0].device
        return torch.zeros(len(self._matrix_of_block), 2, dtype=torch.float64, device=device)

    def _square(self, squares: Tensor) -> None:
        """Write the squared norms that this rank has noted to ``squares`` (blocks, 2)."""
        if not self._noted:
            return
        blocks, gradients, directions = zip(*self._noted, strict=True)
        norms = torch.stack([torch.cat([n.to(squares.device) for n in part]) for part in (gradients, directions)], 1)
        squares.index_copy_(0, index_tensor(list(chain(*blocks)), squares.device), norms.square())
        self._noted = []


def _is_low_precision(shard: Tensor) -> bool:
    return shard.dtype not in (torch.float32, torch.float64)


def _ratio(gradients: Tensor, directions: Tensor) -> Tensor:
    """Factors that give directions of these norms the norms of their gradients."""
    return gradients / (directions + 1e-12)


def block_norms(blocks: Tensor) -> Tensor:
    """Frobenius norms of (k, m, n) ``blocks``, float64 (k,).

    Rows first: so they do not depend on the number of blocks. On a CPU rows in the blocks' own type, which is three
    times as fast. Norms of blocks whose squares float32 cannot hold are computed in float64.
    """
    if blocks.device.type != "cpu":
        return _exact_norms(blocks)
    norms: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(blocks, dim=2), dim=1, dtype=torch.float64)
    extreme = [index for index, norm in enumerate(norms.tolist()) if not _SMALL < norm < _LARGE]  # or not finite
    if extreme:
        norms[extreme] = _exact_norms(blocks[extreme])
    return norms


def _exact_norms(blocks: Tensor) -> Tensor:
    of_rows = torch.linalg.vector_norm(blocks, dim=2, dtype=torch.float64)
    norms: Tensor = torch.linalg.vector_norm(of_rows, dim=1)
    return norms
