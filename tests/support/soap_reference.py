"""A small, slow reference of SOAP in low-bit eigenbases (arXiv 2409.11321, with bases as in 4-bit Shampoo) for tests.

One block at a time, no packing, no batching. A basis is absorbed from the gradient of a refresh alone, by one step of
orthogonal iteration, A V + ridge V = Q R, where V^T V is taken for I, as the library documents it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import CODEBOOKS, Reference, chunks, dequantize, quantize, rectify, sides


class Basis:
    """Eigenvalues and eigenvectors of one side of a block; vectors as codes, or in float32 where `codebook` is None."""

    def __init__(self, order: int, codebook: Tensor | None, block: int, beta: float, matrix_eps: float,
                 rectify_steps: tuple[int, int], dtype: torch.dtype, protect: bool, **way: Any) -> None:  # fmt: skip
        self.top = max(1, order // 16) if protect and codebook is not None else 0
        self.codebook, self.block, self.way, self.beta, self.eps = codebook, block, way, beta, matrix_eps
        self.rectify_steps, self.dtype = (0, 0) if codebook is None else rectify_steps, dtype
        self.eigenvalues = torch.zeros(order)
        self._store(torch.eye(order))

    def _store(self, vectors: Tensor) -> None:
        if self.codebook is None:
            self.plain = vectors.float()
        else:
            rows = vectors.T
            self.places = set(self.eigenvalues.argsort(descending=True, stable=True)[: self.top].tolist())
            rest = [place for place in range(len(rows)) if place not in self.places]
            self.codes, self.scales = quantize(rows[rest], self.codebook, self.block, **self.way)
            scale_dtype = self.way["scale_dtype"]
            top = rows[sorted(self.places)]
            self.leading = quantize(top, CODEBOOKS["linear2"](8), self.block, scale_dtype=scale_dtype)

    def vectors(self) -> Tensor:
        """V as it is used in a step, eigenvectors as columns, float32."""
        return rectify(self._stored(), self.rectify_steps[1])

    def _stored(self) -> Tensor:
        if self.codebook is None:
            return self.plain
        rows = dequantize(self.codes, self.scales, self.codebook, self.block)
        if self.top:
            top = dequantize(*self.leading, CODEBOOKS["linear2"](8), self.block)
            both = iter(top), iter(rows - rows @ top.T @ top)
            rows = torch.stack([next(both[place not in self.places]) for place in range(len(top) + len(rows))])
        return rows.T

    def refresh(self, gradient: Tensor) -> Tensor:
        """Absorb G G^T; nothing happens if G is zero or the result is not finite. Return V before it is stored."""
        if not gradient.any():
            return self.vectors()
        s = (1 - self.beta) * gradient.to(self.dtype) @ gradient.to(self.dtype).T
        v = rectify(self._stored().to(self.dtype), self.rectify_steps[0])
        values = self.beta * self.eigenvalues.to(self.dtype)
        ridge = self.eps * (values + s.diagonal()).max()
        q = torch.linalg.qr(v @ torch.diag(values) + s @ v + ridge * v).Q
        if not q.isfinite().all():
            return self.vectors()
        self.eigenvalues = ((q.T @ v) ** 2 @ values + (q.T @ s @ q).diagonal()).float()
        self._store(q)
        return q.float()


class NoBasis(Basis):
    """A side without factors: its eigenvectors are the coordinates."""

    def __init__(self, order: int) -> None:
        self.identity = torch.eye(order)

    def vectors(self) -> Tensor:
        return self.identity

    def refresh(self, gradient: Tensor) -> Tensor:
        return self.identity


class Moment:
    """A matrix in float32, bfloat16, or 8 bits ("linear2"), as which it is kept between steps."""

    def __init__(self, shape: tuple[int, int], kept: str, block: int, scale_dtype: torch.dtype) -> None:
        self.kept, self.block, self.scale_dtype = kept, block, scale_dtype
        self.value = torch.zeros(shape)
        self.least = self.value  # with half the smallest level for 0, as roots are read

    def store(self, value: Tensor) -> None:
        if self.kept == "factored":
            self.value = value.mean(1, keepdim=True) @ value.mean(0, keepdim=True) / value.mean()
        elif self.kept == "int8":
            book = CODEBOOKS["linear2"](8)
            stored = quantize(value, book, self.block, scale_dtype=self.scale_dtype)
            self.value = dequantize(*stored, book, self.block)
            floor = (stored[1].float() * book[book > 0].min() / 2).repeat_interleave(self.block, 1)
            self.least = torch.maximum(self.value, floor[:, : value.shape[1]])
        else:
            self.value = value.to(getattr(torch, self.kept)).float()


class SoapReference:
    """Gradients in, directions out. `bases[index, row, column]` are the two sides of a block, as Reference.blocks.

    A parameter that is no matrix keeps its gradient.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        *,
        bits: int = 8,
        codebook: str | Tensor = "linear2",
        quant_block_size: int = 64,
        scale_dtype: str = "bfloat16",
        min_quant_numel: int = 4096,
        shampoo_beta: float = 0.9,
        matrix_eps: float = 1e-6,
        statistics_interval: int = 5,
        rectify_steps: tuple[int, int] = (0, 0),
        protect: bool = False,
        refresh_dtype: str = "float32",
        max_preconditioner_dim: int = 256,
        max_aspect: int = 7,
        soap_betas: tuple[float, float] = (0.9, 0.95),
        soap_eps: float = 1e-8,
        newton_schulz_steps: int = 0,
        momentum_dtype: str = "bfloat16",
        second_moment_dtype: str = "bfloat16",
    ) -> None:
        self.shapes, self.interval = [tuple(shape) for shape in shapes], statistics_interval
        self.betas, self.eps, self.t = soap_betas, soap_eps, [0] * len(shapes)
        self.newton_schulz_steps, self.roots_kept = newton_schulz_steps, second_moment_dtype == "int8"
        scales: torch.dtype = getattr(torch, scale_dtype)
        named = isinstance(codebook, str)
        levels = CODEBOOKS[codebook](bits) if named and bits < 32 else codebook
        way: dict[str, Any] = {"scale_dtype": scales, "search": not named}
        self.blocks: dict[tuple[int, int, int], tuple[Basis, Basis, Moment, Moment, tuple[int, int]]] = {}
        for index, shape in enumerate(self.shapes):
            matrix = Reference.matrix_shape(shape)
            has = sides(*matrix, max_aspect) if matrix else (True, True)
            longest = [max_preconditioner_dim * (1 if own else 8) for own in has]
            rows = chunks(matrix[0], longest[0], "aligned") if matrix else []
            columns = chunks(matrix[1], longest[1], "aligned") if matrix else []
            for r0, r1 in rows:
                for c0, c1 in columns:
                    both = [
                        Basis(order, levels if bits < 32 and order**2 >= min_quant_numel else None, quant_block_size,
                              shampoo_beta, matrix_eps, rectify_steps, getattr(torch, refresh_dtype), protect, **way)
                        if own else NoBasis(order)
                        for order, own in zip((r1 - r0, c1 - c0), has, strict=True)
                    ]  # fmt: skip
                    kept = [
                        Moment((r1 - r0, c1 - c0), dtype, quant_block_size, scales)
                        for dtype in (momentum_dtype, second_moment_dtype)
                    ]
                    self.blocks[index, r0, c0] = (both[0], both[1], kept[0], kept[1], (r1, c1))

    def step(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One step; None stays None and does not advance that parameter's t."""
        return [None if g is None else self._direction(i, g.detach().float()) for i, g in enumerate(gradients)]

    def _direction(self, index: int, gradient: Tensor) -> Tensor:
        self.t[index] += 1
        shape = Reference.matrix_shape(self.shapes[index])
        if shape is None:
            return gradient.clone()
        matrix = gradient.reshape(shape)
        out = torch.empty_like(matrix)
        for (own, r0, c0), (left, right, momentum, moment, (r1, c1)) in self.blocks.items():
            if own == index:
                out[r0:r1, c0:c1] = self._block(self.t[index], matrix[r0:r1, c0:c1], left, right, momentum, moment)
        return out.reshape(gradient.shape)

    def _block(self, t: int, g: Tensor, left: Basis, right: Basis, momentum: Moment, moment: Moment) -> Tensor:
        kept, variance = momentum.value, moment.least**2 if self.roots_kept else moment.value
        old = v, w = left.vectors(), right.vectors()
        if t == 1 or t % self.interval == 0:
            v, w = left.refresh(g), right.refresh(g.T)
            r, s = v.T @ old[0], w.T @ old[1]
            kept, variance = r @ kept @ s.T, r**2 @ variance @ (s**2).T
        b1, b2 = self.betas
        p = v.T @ g @ w
        m = b1 * kept + (1 - b1) * p
        d = b2 * variance + (1 - b2) * p**2
        momentum.store(m)
        moment.store(d.sqrt() if self.roots_kept else d)
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * p / (1 - b1**t)
        x = v @ (ahead / ((d / (1 - b2**t)).sqrt() + self.eps)) @ w.T
        if self.newton_schulz_steps:
            x = x / x.norm()
            for _ in range(self.newton_schulz_steps):
                a = x @ x.T
                x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
            x = 0.2 * math.sqrt(max(x.shape)) * x
        return x
