"""Directions of one optimizer in one process, on replayed gradients; on the CPU, or computed on another device."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.numerics.factors import FactorPool


def replayed(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Gradients with a drifting low-rank part, as training has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors = [(normal(s[0], 3), normal(3, torch.Size(s[1:]).numel())) for s in shapes]
    gradients = []
    for _ in range(steps):
        factors = [(a + 0.3 * normal(*a.shape), b + 0.3 * normal(*b.shape)) for a, b in factors]
        gradients.append([(a @ b).view(s) + 0.5 * normal(*s) for (a, b), s in zip(factors, shapes, strict=True)])
    return gradients


class Directions:
    """Shampoo4 around plain gradient descent, asked for its directions. Options without a method are of "shampoo"."""

    def __init__(self, shapes: list[tuple[int, ...]], *, device: str = "cpu", **options: object) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        method = {} if "preset" in options else {"method": "shampoo"}
        self.optimizer = Shampoo4(self.parameters, lr=0.0, base="sgd", **{**method, **options})

    def step(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        self.optimizer.step()
        return [None if p.grad is None else p.grad.to("cpu", copy=True) for p in self.parameters]

    def factor(self, index: int, row: int, column: int, side: str) -> tuple[FactorPool, int]:
        preconditioner = self.optimizer._session.last.preconditioner
        matrices = [i for i, p in enumerate(self.parameters) if p.squeeze().ndim > 1]
        for (matrix, block), places in preconditioner._places.items():
            if (matrices[matrix], block.row, block.column) == (index, row, column):
                return places["LR".index(side)]
        raise KeyError
