"""Grafting: directions take the norms of their gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .preconditioner import Matrix, index_tensor


class Grafting:
    """Gives directions the norms of their gradients, parameter by parameter (Algorithm 4, step 4)."""

    def __init__(self) -> None:
        self._squares: dict[torch.device, list[Tensor]] = {}  # of gradients and directions, a row for each block
        self._matrices: dict[torch.device, list[int]] = {}  # that the rows belong to

    def note(self, members: list[int], matrices: list[Matrix], gradients: Tensor, directions: Tensor) -> None:
        """Graft ``directions`` (k, m, n) of blocks of the matrices ``members`` at once, or remember their norms."""
        grafting = matrices[members[0]].options.grafting
        if grafting == "none":
            return
        norms = torch.stack([block_norms(gradients), block_norms(directions)], dim=1)
        if grafting == "block":
            directions.mul_(_ratio(norms).to(directions.dtype).view(-1, 1, 1))
            return
        self._squares.setdefault(directions.device, []).append(norms.square())
        self._matrices.setdefault(directions.device, []).extend(members)

    def apply(self, gradients: list[Tensor | None]) -> None:
        """Scale the directions that now stand in ``gradients``."""
        for device, squares in self._squares.items():
            members = self._matrices[device]
            sums = torch.zeros(len(gradients), 2, dtype=torch.float64, device=device)
            sums.index_add_(0, index_tensor(members, device), torch.cat(squares))
            ratios = _ratio(sums.sqrt()).to(torch.float32).unbind()
            for index in dict.fromkeys(members):
                gradient = cast(Tensor, gradients[index])
                if gradient.dtype in (torch.float32, torch.float64):
                    gradient.mul_(ratios[index])
                else:  # a ratio rounded to the gradient's type would change the norm
                    gradient.copy_(gradient.float() * ratios[index])


def _ratio(norms: Tensor) -> Tensor:
    """Factors that give directions the norms of their gradients; ``norms`` (k, 2) of gradients and directions."""
    return norms[:, 0] / (norms[:, 1] + 1e-12)


def block_norms(blocks: Tensor) -> Tensor:
    """Frobenius norms of (k, m, n) ``blocks``, float64 (k,): scaled by the largest magnitude, so that no square leaves
    the range of float32, and independent of the number of blocks."""
    largest = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=(1, 2), keepdim=True)
    rows = torch.linalg.vector_norm(blocks / largest.clamp_min(torch.finfo(blocks.dtype).tiny), dim=2)
    norms: Tensor = largest.flatten().double() * torch.linalg.vector_norm(rows.double(), dim=1)
    return norms
