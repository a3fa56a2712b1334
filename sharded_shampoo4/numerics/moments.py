"""Momentum and second moments of blocks in the coordinates of their eigenbases: what makes Shampoo's bases SOAP.

Source: SOAP (Vyas et al., arXiv 2409.11321); the same rule is called eigenvalue-corrected Shampoo in arXiv 2506.03595.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import PreconditionerOptions
from . import eigenbasis, linalg
from .pool import Coding, Index, Layout, Pool, layout_bytes

_SMALLEST = 1 / 255**2  # level above zero of 8-bit linear squares
_TOO_LARGE = 1e30  # for a second moment, which float32 and bfloat16 hold up to 3e38


def moments_layout(rows: int, columns: int, options: PreconditionerOptions) -> Layout:
    """Name, shape and type of every tensor that the moments of one block keep; nothing but with method="soap".

    ``momentum`` and ``second_moment`` (rows, columns) as they are, or in 8 bits: of the second moment its square roots,
    or the means of its ``.rows`` and ``.columns``.
    ``decays``: the powers b1^t and b2^t of the decays, after t steps of the block.
    """
    if options.method != "soap":
        return {}
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"decays": ((2,), torch.float64)}
    for name, kept in (("momentum", options.momentum_dtype), ("second_moment", options.second_moment_dtype)):
        if kept == "factored":
            layout[f"{name}.rows"], layout[f"{name}.columns"] = ((rows,), torch.float32), ((columns,), torch.float32)
        elif kept == "int8":
            layout.update(Coding.of(options).in_8_bits().layout(name, rows, columns))
        else:
            layout[name] = ((rows, columns), getattr(torch, kept))
    return layout


def moments_bytes(rows: int, columns: int, options: PreconditionerOptions) -> int:
    """Bytes that the moments of one block keep."""
    return layout_bytes(moments_layout(rows, columns, options))


class Turn(NamedTuple):
    """New bases on one side of some blocks.

    Attributes:
        side: 0 for left bases, 1 for right ones.
        which: positions of the blocks, int64 (k,), ascending.
        rotation: V_new^T V_old of each, (k, n, n).
    """

    side: int
    which: Tensor
    rotation: Tensor


class MomentPool(Pool):
    """The moments of ``count`` blocks of (rows, columns) elements with the same options, on one device; zero at first.

    Momentum and second moment are the running averages of P and P * P, where P = V_L^T G V_R is a block's gradient in
    the coordinates of its eigenbases.
    """

    def __init__(
        self, shape: tuple[int, int], count: int, options: PreconditionerOptions, device: torch.device
    ) -> None:
        super().__init__(moments_layout(*shape, options), count, Coding.of(options).in_8_bits(), device)
        self.columns = shape[1]
        self.options = options
        self.betas = torch.tensor(options.soap_betas, dtype=torch.float64, device=device)
        if self.tensors:
            self.tensors["decays"].fill_(1.0)

    def rotate(self, where: Index, turns: Sequence[Turn], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Express the moments of blocks in their new bases.

        With R = V_new^T V_old the momentum becomes R M on the left side, and the second moment (R * R) D: what it would
        be if the coordinates of gradients were uncorrelated. A coordinate that is new would else be divided by nothing.

        A second moment of 1e30, as after one gradient of 1e16, would stop its block for thousands of steps, and an
        infinite one for good. Both moments of such a block are reset to zero.

        Args:
            where: the blocks.
            turns: at most one for each side.
            dtype: in which to compute.

        Returns:
            momentum and second moment (k, rows, columns) before they are rounded to what is stored.
        """
        momentum, moment = self._fresh("momentum", where, dtype), self._second_moment(where, dtype)
        lost = ~(moment.flatten(1).amax(1) < _TOO_LARGE)  # true of NaN
        self.tensors["decays"][where] = torch.where(lost.view(-1, 1), 1.0, self.stored("decays", where))
        for kept in (momentum, moment):
            kept.masked_fill_(lost.view(-1, 1, 1), 0.0)
        for turn in turns:
            momentum = _turned(momentum, turn, turn.rotation)
            moment = _turned(moment, turn, turn.rotation.square())
        self._store("momentum", where, momentum)
        self._store_second_moment(where, moment)
        return momentum, moment

    def direct(self, where: Index, projected: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Absorb gradients, and return directions: X / (sqrt(D / (1 - b2^t)) + eps).

        X is Nesterov's momentum, b1 M / (1 - b1^(t+1)) + (1 - b1) P / (1 - b1^t).
        Newton-Schulz steps give directions singular values of about 1, and the size that Muon's have with AdamW's
        learning rates: a root mean square of 0.2.

        Args:
            where: the blocks.
            projected: P of each, (k, rows, columns); is overwritten.
            moments: what :meth:`rotate` has returned in this step, if it was called.

        Returns:
            Tensor: directions (k, rows, columns) in the coordinates of the eigenbases.
        """
        first, second = self.options.soap_betas
        if moments is None:
            moments = self._fresh("momentum", where, projected.dtype), self._second_moment(where, projected.dtype)
        momentum, moment = moments
        # On a CPU products and sums are apart: one operation may round them otherwise at another place in memory.
        if projected.device.type == "cpu":
            moment.mul_(second).add_(projected.square().mul_(1 - second))
            momentum.mul_(first).add_(projected.mul_(1 - first))
            weight = 1.0
        else:
            moment.lerp_(projected.square(), 1 - second)
            momentum.lerp_(projected, 1 - first)
            weight = 1 - first
        self._store("momentum", where, momentum)
        decays = self.stored("decays", where) * self.betas
        self.tensors["decays"][where] = decays
        mass, second_mass = (1 - decays).unbind(1)
        momentum.mul_(_each(first * mass / (1 - first * decays[:, 0]), momentum)).add_(projected, alpha=weight)
        roots = self._store_second_moment(where, moment)
        roots = roots.mul_(_each(mass / second_mass.sqrt(), roots)).add_(_each(self.options.soap_eps * mass, roots))
        directions = momentum.div_(roots)
        if self.options.newton_schulz_steps:
            directions = eigenbasis.orthogonalize(directions, self.options.newton_schulz_steps)
            directions = directions * (0.2 * max(directions.shape[1:]) ** 0.5)
        return directions

    def _fresh(self, name: str, where: Index, dtype: torch.dtype) -> Tensor:
        """What is stored, as numbers of ``dtype`` in memory of its own."""
        found = self.decode(name, where, self.columns)
        return found.to(dtype, copy=name in self.tensors)

    def _second_moment(self, where: Index, dtype: torch.dtype) -> Tensor:
        """The second moments; of those in 8 bits, no root is below half of the smallest level.

        A root that is rounded to zero would make a direction of any size of what is left of the momentum. What has been
        infinite stays infinite, so that directions are zero.
        """
        if self.options.second_moment_dtype == "factored":
            rows, columns = (self.stored(f"second_moment.{kind}", where).to(dtype) for kind in ("rows", "columns"))
            return _product(rows, columns)
        moment = self._fresh("second_moment", where, dtype)
        if self.options.second_moment_dtype != "int8":
            return moment
        floor = self.stored("second_moment.scales", where).float() * (_SMALLEST / 2)
        floor = floor.repeat_interleave(self.options.quant_block_size, -1)[..., : self.columns]
        return torch.fmax(moment, floor.to(dtype)).square_()  # a NaN is a part of infinity

    def _store_second_moment(self, where: Index, moment: Tensor) -> Tensor:
        """Store the second moments, in 8 bits their roots. Returns the roots."""
        roots = moment.sqrt()
        if self.options.second_moment_dtype == "factored":
            for kind, means in zip(("rows", "columns"), _means(moment), strict=True):
                self.tensors[f"second_moment.{kind}"][where] = means.to(torch.float32)
        else:
            self._store("second_moment", where, roots if self.options.second_moment_dtype == "int8" else moment)
        return roots

    def _store(self, name: str, where: Index, values: Tensor) -> None:
        if name in self.tensors and isinstance(where, slice):
            self.stored(name, where).copy_(values)  # rounded on the way
            return
        for key, value in self.encode(name, values).items():
            self.tensors[key][where] = value


def _turned(kept: Tensor, turn: Turn, rotation: Tensor) -> Tensor:
    """Multiply blocks of ``kept`` (k, rows, columns) with ``rotation`` on the side of ``turn``."""
    is_whole = len(turn.which) == len(kept)  # then they are in order
    part = kept if is_whole else kept[turn.which]
    product = linalg.matmul(rotation, part) if turn.side == 0 else linalg.matmul(part, rotation.mT)
    return product if is_whole else kept.index_copy_(0, turn.which, product)


def _means(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the rows (k, m) and of the columns (k, n) of (k, m, n) matrices."""
    return matrices.mean(2), matrices.mean(1)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """The matrices (k, m, n) of rank one that have these means: Adafactor's second moments. Infinite if a mean is."""
    whole = rows.mean(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    infinite = ~whole.isfinite()
    share, columns = (rows / whole).masked_fill_(infinite, 1.0), columns.masked_fill(infinite, torch.inf)
    return share.unsqueeze(2) * columns.unsqueeze(1)


def _each(numbers: Tensor, like: Tensor) -> Tensor:
    """One number (k,) for each block, to multiply with blocks ``like`` (k, rows, columns)."""
    return numbers.to(like.dtype).view(-1, 1, 1)
