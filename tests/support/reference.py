"""A small, slow reference of 4-bit Shampoo (Wang, Zhou, Li, Huang, NeurIPS 2024, arXiv 2405.18144) for tests.

One matrix at a time, no packing, no batching, codes kept as plain integers. Section numbers are the paper's; "Alg. 1"
is the preconditioner update, "Alg. 2" the inverse root, "Alg. 3" the optimizer, "Alg. 4" the 32-bit optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # the smallest normal float32


# ---------------------------------------------------------------------------------------------------- quantization


def linear2(bits: int) -> Tensor:
    """Linear-square code book (Sec. 3.3): sign(d) d^2 with d = -1 + 2j / (2^b - 1), and 0 at j = 2^(b-1) - 1."""
    top = 2**bits - 1
    values = []
    for j in range(top + 1):
        d = (2 * j - top) / top
        values.append(0.0 if j == 2 ** (bits - 1) - 1 else math.copysign(d * d, d))
    return torch.tensor(values, dtype=torch.float64).float()


def dynamic_tree(bits: int) -> Tensor:
    """Dynamic-tree code book (App. C): 0, 1 and +-q_k 10^-E, with b = 2 + E + F and 2^F middles q_k of [0.1, 1]."""
    values = [0.0, 1.0]
    for exponent in range(bits - 1):
        parts = 2 ** (bits - 2 - exponent)
        edges = [0.9 * j / parts + 0.1 for j in range(parts + 1)]
        for k in range(parts):
            q = (edges[k] + edges[k + 1]) / 2 * 10.0**-exponent
            values += [q, -q]
    return torch.tensor(sorted(values), dtype=torch.float64).float()


CODEBOOKS = {"linear2": linear2, "dynamic_tree": dynamic_tree}


def quantize(
    matrix: Tensor, codebook: Tensor, block: int = 64, scale_dtype: torch.dtype = torch.float32, search: bool = False
) -> tuple[Tensor, Tensor]:
    """Block-wise quantization along each row (Sec. 2.2, 3.3): integer codes (rows, n), scales (rows, blocks).

    A block is `block` neighbors of one row (the row's last block may be shorter); its scale is the largest magnitude.
    The code is the index of the value nearest to x / scale (a float32 quotient), the lower index at a tie. Distances
    are taken in float64, where the difference of two float32 numbers of like size is exact. A block of zeros has
    scale 0 and the code of 0. With `search`, codes by 0.88, 0.96 and 1.04 of the largest magnitude
    are tried, each with the scale that fits them best, and those with the least squared error are kept.
    """
    x = matrix.detach().float().numpy()
    levels = codebook.double().numpy()
    rows, n = x.shape
    codes = np.zeros((rows, n), dtype=np.int64)
    scales = np.zeros((rows, math.ceil(n / block)), dtype=np.float32)
    for i in range(rows):
        for b, start in enumerate(range(0, n, block)):
            piece = x[i, start : start + block]
            largest = np.abs(piece).max()
            tried = []
            for share in (0.88, 0.96, 1.04) if search else (1.0,):
                scale = np.float32(share) * largest
                if not search:
                    scale = torch.tensor(scale).to(scale_dtype).float().numpy()
                ratio = piece / scale if scale > 0 else np.zeros_like(piece)
                distance = np.abs(ratio.astype(np.float64)[:, None] - levels[None, :])
                code = distance.argmin(axis=1)  # numpy takes the first of equals
                if search and scale > 0:
                    fit = (piece.astype(np.float64) * levels[code]).sum() / (levels[code] ** 2).sum()
                    scale = torch.tensor(np.float32(fit)).to(scale_dtype).float().numpy()
                tried.append((((piece - levels[code] * float(scale)) ** 2).sum(), code, scale))
            _, codes[i, start : start + block], scales[i, b] = min(tried, key=lambda found: found[0])
    return torch.from_numpy(codes), torch.from_numpy(scales).to(scale_dtype)


def dequantize(codes: Tensor, scales: Tensor, codebook: Tensor, block: int = 64) -> Tensor:
    """R(code) * scale in float32."""
    out = codebook.float()[codes]
    for j in range(out.shape[1]):
        out[:, j] *= scales[:, j // block].float()
    return out


# ---------------------------------------------------------------------------------------------- matrix functions


def rectify(vectors: Tensor, steps: int) -> Tensor:
    """Bjorck orthonormalization (Sec. 3.4): V <- 1.5 V - 0.5 V V^T V, `steps` times."""
    for _ in range(steps):
        vectors = 1.5 * vectors - 0.5 * vectors @ vectors.T @ vectors
    return vectors


def damped_root(eigenvalues: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """(lambda + eps lambda_max)^(-1/root) of eigenvalues clamped at 0, with a base of at least TINY."""
    eigenvalues = eigenvalues.clamp(min=0)
    powers: Tensor = (eigenvalues + matrix_eps * eigenvalues.max()).clamp(min=TINY) ** (-1 / root)
    return powers


def root_by_eigh(matrix: Tensor, matrix_eps: float, root: int = 4) -> Tensor:
    """Inverse root of a symmetric matrix (Alg. 4). Of a not quite symmetric one, eigh reads the lower half."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors @ torch.diag(damped_root(eigenvalues, matrix_eps, root)) @ vectors.T
    return found


def sides(rows: int, columns: int, max_aspect: int) -> tuple[bool, bool]:
    """Whether the rows of a matrix have factors, and whether its columns have: not a side that is much the longer."""
    aspect = 4 * max_aspect if rows * columns < 4096 else max_aspect
    return not 0 < aspect < rows / columns, not 0 < aspect < columns / rows


def chunks(size: int, largest: int, split: str) -> list[tuple[int, int]]:
    """Intervals that cut `size`: "remainder" takes `largest` while it fits (the paper), "even" nearly equal ones.

    "aligned" hands out units of 64 elements, or of 32, 16, 8 or 1 where the first interval would be too long or the
    last, which ends where `size` does, shorter than three quarters of it.
    """
    count = math.ceil(size / largest)
    if split == "remainder":
        lengths = [min(largest, size - k * largest) for k in range(count)]
    elif split == "aligned" and count > 1:
        for unit in (64, 32, 16, 8, 1):
            units = [len(range(k, math.ceil(size / unit), count)) for k in range(count)]  # dealt like cards
            lengths = [unit * number for number in units]
            lengths[-1] -= sum(lengths) - size
            if unit == 1 or (max(lengths) <= largest and min(lengths) >= 0.75 * max(lengths)):
                break
    else:
        lengths = [size // count + (1 if k < size % count else 0) for k in range(count)]
    ends = np.cumsum(lengths).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


# --------------------------------------------------------------------------------------------------------- factors


class Off:
    """A square matrix as a float32 diagonal and quantized off-diagonal rows (the paper's (a, Q(A - Diag(a))))."""

    def __init__(self, matrix: Tensor, codebook: Tensor, block: int, **way: Any) -> None:
        self.codebook, self.block = codebook, block
        self.diagonal = matrix.diagonal().float().clone()
        off = matrix.float() - torch.diag(self.diagonal)
        self.codes, self.scales = quantize(off, codebook, block, **way)

    def dense(self) -> Tensor:
        off = dequantize(self.codes, self.scales, self.codebook, self.block)
        off.fill_diagonal_(0)  # not every code book has a level 0
        return off + torch.diag(self.diagonal)


class Factor:
    """One side's preconditioner of a block. `kind` says what is stored:

    eigenbasis      eigenvalues (fp32); codes and scales of V^T, each row one eigenvector; root_off (Off), unless the
                    root is implicit, which is then computed from V whenever it is asked for
    preconditioner  off (Off) of the preconditioner itself, the naive baseline; root_off (Off)
    plain           matrix (fp32) and root_matrix (fp32), as 32-bit Shampoo keeps them
    """

    def __init__(self, order: int, kind: str, codebook: Tensor, block: int, beta: float, matrix_eps: float,
                 rectify_steps: tuple[int, int], dtype: torch.dtype, root: str = "stored", iterations: int = 1,
                 power: int = 4, **way: Any) -> None:  # fmt: skip
        self.implicit = root == "implicit" and kind == "eigenbasis"
        self.iterations, self.way, self.power = iterations, way, power
        self.order, self.kind, self.codebook, self.block = order, kind, codebook, block
        self.beta, self.matrix_eps, self.rectify_steps, self.dtype = beta, matrix_eps, rectify_steps, dtype
        identity = torch.eye(order)
        if kind == "eigenbasis":
            self.eigenvalues = torch.full((order,), matrix_eps)
            self.codes, self.scales = quantize(identity, codebook, block, **way)
        elif kind == "preconditioner":
            self.off = Off(matrix_eps * identity, codebook, block, **way)
        else:
            self.matrix = matrix_eps * identity
        self._store_root(identity)

    def _store_root(self, root: Tensor) -> None:
        if self.kind == "plain":
            self.root_matrix = root.float()
        elif not self.implicit:
            self.root_off = Off(root, self.codebook, self.block, **self.way)

    def vectors(self) -> Tensor:
        """Dequantized V, eigenvectors as columns, before rectification."""
        return dequantize(self.codes, self.scales, self.codebook, self.block).T

    def preconditioner(self, steps: int = 0) -> Tensor:
        """The stored preconditioner as a dense matrix in the refresh dtype; `steps` rectify the eigenbasis."""
        if self.kind == "eigenbasis":
            v = rectify(self.vectors().to(self.dtype), steps)
            return v @ torch.diag(self.eigenvalues.to(self.dtype)) @ v.T
        return (self.off.dense() if self.kind == "preconditioner" else self.matrix).to(self.dtype)

    def root(self) -> Tensor:
        """The inverse root as a dense float32 matrix."""
        if self.implicit:
            v = rectify(self.vectors(), self.rectify_steps[1])
            return v @ torch.diag(damped_root(self.eigenvalues, self.matrix_eps, self.power)) @ v.T
        return self.root_matrix if self.kind == "plain" else self.root_off.dense()

    def update(self, statistic: Tensor) -> None:
        """Alg. 1 (eigenbasis) or L <- beta L + (1 - beta) M (the others); a result that is not finite is dropped."""
        t1 = self.rectify_steps[0]
        if self.kind == "eigenbasis":
            self.latest = self.eigenvalues.to(self.dtype), rectify(self.vectors().to(self.dtype), t1)
        a = self.beta * self.preconditioner(t1) + (1 - self.beta) * statistic.to(self.dtype)
        if not a.float().isfinite().all():
            return
        if self.kind == "preconditioner":
            self.off = Off(a, self.codebook, self.block, **self.way)
        elif self.kind == "plain":
            self.matrix = a.float()
        else:
            p = rectify(self.vectors().to(self.dtype), t1)
            for _ in range(self.iterations):
                p = torch.linalg.qr((p.T @ a).T).Q  # one step of subspace iteration from the old basis (App. B)
            eigenvalues = (p.T @ a @ p).diagonal()
            if p.isfinite().all() and eigenvalues.float().isfinite().all():
                self.latest = eigenvalues, p
                self.eigenvalues = eigenvalues.float().clone()
                self.codes, self.scales = quantize(p.T, self.codebook, self.block, **self.way)

    def invert(self, fresh: bool = False) -> None:
        """Alg. 2 (eigenbasis), or the root by eigh; a result that is not finite is dropped.

        With `fresh` the root is that of the eigenbasis before it was quantized: of the one that was there, dequantized
        and rectified, if the update has dropped the new one.
        """
        if self.kind == "eigenbasis":
            eigenvalues, v = self.eigenvalues.to(self.dtype), self.vectors().to(self.dtype)
            eigenvalues, v = self.latest if fresh else (eigenvalues, rectify(v, self.rectify_steps[1]))
            root = v @ torch.diag(damped_root(eigenvalues, self.matrix_eps, self.power)) @ v.T
        else:
            try:
                root = root_by_eigh(self.preconditioner(), self.matrix_eps, self.power)
            except RuntimeError:  # torch.linalg.LinAlgError
                return
        if root.float().isfinite().all():
            self._store_root(root)


# ------------------------------------------------------------------------------------------------------- optimizer


class Reference:
    """Alg. 3 (or Alg. 4 with bits=32) up to the base optimizer: gradients in, directions out.

    factors[index, row, column, side] is the Factor of the block of parameter `index` whose first element stands at
    (row, column) of the parameter matrix; side "L" (G G^T) or "R" (G^T G). t[index] counts the parameter's steps.
    `codebook` may be levels themselves, with scales of least squared error. `phases` say, by the same keys, in
    which step of the two intervals a factor takes its statistics and its root, where that is not the last one.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        *,
        bits: int = 4,
        quantize: Literal["eigenbasis", "preconditioner"] = "eigenbasis",
        codebook: Literal["linear2", "dynamic_tree"] | Tensor = "linear2",
        quant_block_size: int = 64,
        scale_dtype: Literal["float32", "bfloat16"] = "float32",
        root: Literal["stored", "rectified", "implicit"] = "stored",
        min_quant_numel: int = 4096,
        shampoo_beta: float = 0.95,
        matrix_eps: float = 1e-6,
        statistics_interval: int = 100,
        root_interval: int = 500,
        rectify_steps: tuple[int, int] = (1, 2),
        refresh_iterations: int = 1,
        refresh_dtype: Literal["float64", "float32"] = "float32",
        max_preconditioner_dim: int = 1024,
        max_aspect: int = 7,
        split: Literal["aligned", "even", "remainder"] = "aligned",
        grafting: Literal["parameter", "block", "none"] = "parameter",
        phases: Mapping[tuple[int, int, int, str], tuple[int, int]] | None = None,
    ) -> None:
        self.phases = phases or {}
        self.statistics_interval, self.root_interval, self.grafting = statistics_interval, root_interval, grafting
        self.fresh_roots = root == "stored"
        self.dtype: torch.dtype = getattr(torch, refresh_dtype)
        self.shapes = [tuple(shape) for shape in shapes]
        self.t = [0] * len(self.shapes)
        self.blocks: list[list[tuple[int, int, int, int]]] = []  # per parameter: row start, stop, column start, stop
        self.factors: dict[tuple[int, int, int, str], Factor] = {}
        named = isinstance(codebook, str)
        levels = CODEBOOKS[codebook](bits) if named and bits < 32 else codebook
        more = {"scale_dtype": getattr(torch, scale_dtype), "search": not named}
        more.update(root=root, iterations=refresh_iterations)
        for index, shape in enumerate(self.shapes):
            self.blocks.append([])
            matrix = self.matrix_shape(shape)
            if matrix is None:
                continue
            has = sides(*matrix, max_aspect)
            longest = [max_preconditioner_dim * (1 if own else 8) for own in has]
            for r0, r1 in chunks(matrix[0], longest[0], split):
                for c0, c1 in chunks(matrix[1], longest[1], split):
                    self.blocks[index].append((r0, r1, c0, c1))
                    for side, order, own in (("L", r1 - r0, has[0]), ("R", c1 - c0, has[1])):
                        if not own:
                            continue
                        kind = "plain" if bits == 32 or order**2 < min_quant_numel else quantize
                        self.factors[index, r0, c0, side] = Factor(
                            order, kind, levels, quant_block_size, shampoo_beta, matrix_eps, rectify_steps, self.dtype,
                            power=4 if all(has) else 2, **more,
                        )  # fmt: skip

    @staticmethod
    def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
        """The parameter matrix: size-1 dims dropped, (dim0, rest); None when it is not preconditioned."""
        kept = [d for d in shape if d != 1]
        return (kept[0], math.prod(kept[1:])) if len(kept) >= 2 and 0 not in kept else None

    def step(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One step; None stays None and does not advance that parameter's t."""
        return [None if g is None else self._direction(i, g.detach().float()) for i, g in enumerate(gradients)]

    def _direction(self, index: int, gradient: Tensor) -> Tensor:
        self.t[index] += 1
        t, blocks, shape = self.t[index], self.blocks[index], self.matrix_shape(self.shapes[index])
        if shape is None:
            return gradient.clone()
        matrix = gradient.reshape(shape)
        out = torch.empty_like(matrix)
        for r0, r1, c0, c1 in blocks:
            g = matrix[r0:r1, c0:c1]
            left, right = (self.factors.get((index, r0, c0, side)) for side in "LR")
            h = g.to(self.dtype)
            for side, factor, statistic in (("L", left, h @ h.T), ("R", right, h.T @ h)):
                if factor is None:
                    continue
                statistics_phase, root_phase = self.phases.get((index, r0, c0, side), (0, 0))
                updated = t % self.statistics_interval == statistics_phase
                if updated:
                    factor.update(statistic)
                if t % self.root_interval == root_phase:
                    factor.invert(self.fresh_roots and updated)
            d = g if left is None else left.root() @ g
            d = d if right is None else d @ right.root()
            out[r0:r1, c0:c1] = graft(d, g) if self.grafting == "block" else d
        if t < self.root_interval:  # no root yet: every root is the identity
            return gradient.clone()
        if self.grafting == "parameter":
            out = graft(out, matrix)
        return out.reshape(gradient.shape)


def graft(direction: Tensor, gradient: Tensor) -> Tensor:
    """The direction with the gradient's norm: D ||G|| / (||D|| + 1e-12), norms summed in float64."""
    scale: Tensor = gradient.double().norm() / (direction.double().norm() + 1e-12)
    return direction * scale.float()


# ----------------------------------------------------------------------------------------------------- static error


def spectrum_of(name: Literal["two_valued", "log_uniform"], order: int) -> Tensor:
    """float64 eigenvalues: "two_valued": 1 for a share (1000 / 0.02)^(-1/4) of the order (80 of 1200), else 1000;
    "log_uniform": evenly spaced logarithms from 1e-3 to 1e3."""
    if name == "log_uniform":
        return torch.logspace(-3, 3, order, dtype=torch.float64)
    values = torch.full((order,), 1000.0, dtype=torch.float64)
    values[: round(order * (1000 / 0.02) ** -0.25)] = 1
    return values


def inverse_root_errors(
    order: int,
    spectrum: Literal["two_valued", "log_uniform"] | Tensor,
    codebook: Tensor,
    seed: int = 0,
    *,
    block: int = 64,
    matrix_eps: float = 1e-6,
    rectify_steps: int = 4,
) -> dict[str, float]:
    """Normwise relative errors of the damped inverse fourth root f (Table 1); A = U Lambda U^T with random U.

    naive             f(D(A)): the matrix itself quantized, its diagonal in float32
    eigenbasis        f(V Lambda V^T), V = D(Q(U)): the paper's measure of a basis that is not rectified
    unrectified       V f(Lambda) V^T: what Alg. 2 computes with t2 = 0, larger because V is not orthogonal
    rectified         V f(Lambda) V^T of the rectified V (there the two measures agree)
    rectified_stored  and that root stored with a float32 diagonal and a quantized off-diagonal part, as Alg. 2 does
    Float64 apart from what is stored. At order 1200, "two_valued", 4-bit linear2 the paper has .0942 and .0669 for the
    basis without and with rectification, on a random matrix of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
    eigenvalues = spectrum_of(spectrum, order) if isinstance(spectrum, str) else spectrum.double()
    powers = torch.diag(damped_root(eigenvalues, matrix_eps))
    exact = u @ powers @ u.T
    naive = Off(u @ torch.diag(eigenvalues) @ u.T, codebook, block).dense().double()
    v = dequantize(*quantize(u.T, codebook, block), codebook, block).double().T
    w = rectify(v, rectify_steps)
    roots = {
        "naive": root_by_eigh(naive, matrix_eps),
        "eigenbasis": root_by_eigh(v @ torch.diag(eigenvalues) @ v.T, matrix_eps),
        "unrectified": v @ powers @ v.T,
        "rectified": w @ powers @ w.T,
        "rectified_stored": Off(w @ powers @ w.T, codebook, block).dense().double(),
    }
    return {name: float((root - exact).norm() / exact.norm()) for name, root in roots.items()}
