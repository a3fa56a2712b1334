"""All preconditioners of a rank: parameter matrices, their blocks in equal-shaped batches, and those blocks' factors.

Knows tensors and numbers, not how parameters or gradients are laid out over ranks.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import FactorPool, Index, factor_bytes
from .layout import Block, cut_blocks
from .linalg import matmul
from .options import PreconditionerOptions

# Elements of a batch's gradients, directions and dequantised roots together: bounds the memory in flight of a step.
BATCH_ELEMENTS = 2**24

_HEADER = struct.Struct("<qq")  # steps taken, whether a root step has come: precedes a matrix's factors in its bytes

Place = tuple[FactorPool, int]  # where a factor is kept
_Alike = tuple[PreconditionerOptions, torch.device, torch.dtype, int, int]  # what blocks of one batch share


def read_header(data: Tensor) -> tuple[int, bool]:
    """Steps taken and whether a root step has come, of :meth:`Preconditioner.to_bytes`'s result."""
    step, rooted = _HEADER.unpack(bytes(data[: _HEADER.size].tolist()))
    return step, bool(rooted)


@dataclass(eq=False)
class Matrix:
    """A preconditioned parameter and how far its preconditioner has come."""

    name: str
    shape: tuple[int, int]
    options: PreconditionerOptions
    device: torch.device
    dtype: torch.dtype = torch.float32  # in which directions are computed: float32, or float64 for such parameters
    step: int = 0  # optimizer steps with a gradient, counted from 1
    rooted: bool = False  # before the first root step every inverse root is the identity

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return cut_blocks(self.shape, self.options.max_preconditioner_dim, self.options.split)

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        self.rooted = self.rooted or self.root_due

    def like(self, other: Matrix) -> bool:
        """Whether the same factors serve both."""
        return (self.shape, self.options, self.device, self.dtype) == (
            other.shape,
            other.options,
            other.device,
            other.dtype,
        )

    @property
    def busy(self) -> bool:
        """Whether this step needs the gradient at all."""
        return self.rooted or self.statistics_due

    @property
    def statistics_due(self) -> bool:
        return self.step % self.options.statistics_interval == 0

    @property
    def root_due(self) -> bool:
        return self.step % self.options.root_interval == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all factors of this matrix."""
        return sum(
            factor_bytes(block.rows, self.options) + factor_bytes(block.columns, self.options) for block in self.blocks
        )

    @property
    def packed_bytes(self) -> int:
        """Length of :meth:`Preconditioner.to_bytes`'s result."""
        return _HEADER.size + self.nbytes


class BlockBatch:
    """Equal-shaped blocks whose left factors are neighbours in one pool and right factors in another (or the same)."""

    def __init__(
        self, members: list[tuple[int, Block]], left: FactorPool, left_start: int, right: FactorPool, right_start: int
    ) -> None:
        self.members = members  # index of the matrix, block
        self.left, self.left_start = left, left_start
        self.right, self.right_start = right, right_start

    def absorb(self, chosen: Sequence[int], gradients: Tensor) -> None:
        """Statistics step of the ``chosen`` members with their ``gradients`` (k, rows, columns)."""
        left, right = self._positions(chosen)
        if self.left is self.right:
            self.left.absorb(torch.cat([left, right]), torch.cat([gradients, gradients.mT]))
        else:
            self.left.absorb(left, gradients)
            self.right.absorb(right, gradients.mT)

    def invert(self, chosen: Sequence[int]) -> None:
        """Root step of the ``chosen`` members."""
        left, right = self._positions(chosen)
        if self.left is self.right:
            self.left.invert(torch.cat([left, right]))
        else:
            self.left.invert(left)
            self.right.invert(right)

    def precondition(self, chosen: Sequence[int], gradients: Tensor) -> Tensor:
        """Directions L^(-1/4) G R^(-1/4) of the ``chosen`` members, before grafting: (k, rows, columns)."""
        left, right = self._runs(chosen)
        left_root, right_root = (self.left.root(left).to(gradients.dtype), self.right.root(right).to(gradients.dtype))
        return matmul(matmul(left_root, gradients), right_root)

    def _positions(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions = index_tensor(chosen, self.left.device)
        return positions + self.left_start, positions + self.right_start

    def _runs(self, chosen: Sequence[int]) -> tuple[Index, Index]:
        """Like :meth:`_positions`, but as slices where all members are chosen: views instead of copies."""
        if len(chosen) < len(self.members):
            return self._positions(chosen)
        return (
            slice(self.left_start, self.left_start + len(chosen)),
            slice(self.right_start, self.right_start + len(chosen)),
        )


def index_tensor(positions: Sequence[int], device: torch.device) -> Tensor:
    """``positions`` on ``device``; remembered, so that steps that are alike copy nothing from the host."""
    return _index_tensor(tuple(positions), device)


@functools.lru_cache(maxsize=1024)
def _index_tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, device=device)


class Preconditioner:
    """The factors of all blocks of ``matrices``, in pools of equal order and batches of equal shape."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = list(matrices)
        self.pools: list[FactorPool] = []
        self.batches: list[BlockBatch] = []
        self._places: dict[tuple[int, Block], tuple[Place, Place]] = {}  # of a matrix's block: left and right factor
        self._build()

    def _build(self) -> None:
        alike: dict[_Alike, list[tuple[int, Block]]] = {}
        for index, matrix in enumerate(self.matrices):
            for block in matrix.blocks:
                key = (matrix.options, matrix.device, matrix.dtype, block.rows, block.columns)
                alike.setdefault(key, []).append((index, block))

        sizes: dict[tuple[PreconditionerOptions, torch.device, int], int] = {}
        starts: dict[_Alike, list[int]] = {}
        for key, members in alike.items():
            starts[key] = []
            for order in key[3:]:
                pool = (key[0], key[1], order)
                starts[key].append(sizes.get(pool, 0))
                sizes[pool] = starts[key][-1] + len(members)

        pools = {key: FactorPool(key[2], count, key[0], key[1]) for key, count in sizes.items()}
        self.pools = list(pools.values())
        for key, members in alike.items():
            options, device, _, rows, columns = key
            left, right = pools[options, device, rows], pools[options, device, columns]
            self._add_batches(members, left, starts[key][0], right, starts[key][1])

    def _add_batches(
        self, members: list[tuple[int, Block]], left: FactorPool, left_start: int, right: FactorPool, right_start: int
    ) -> None:
        for offset, (index, block) in enumerate(members):
            self._places[index, block] = (left, left_start + offset), (right, right_start + offset)
        rows, columns = left.order, right.order
        size = max(1, BATCH_ELEMENTS // (rows * rows + columns * columns + 2 * rows * columns))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            self.batches.append(BlockBatch(chunk, left, left_start + start, right, right_start + start))

    def directions(self, batch: BlockBatch, chosen: Sequence[int], gradients: Tensor) -> Tensor:
        """Let the ``chosen`` members of ``batch`` take their step with ``gradients`` (k, rows, columns).

        Statistics and roots as they are due; returns the directions, grafted if grafting is by block, else raw.
        """
        matrices = [self.matrices[batch.members[position][0]] for position in chosen]
        absorbing = [k for k, matrix in enumerate(matrices) if matrix.statistics_due]
        if absorbing:
            taken = gradients if len(absorbing) == len(chosen) else gradients[index_tensor(absorbing, gradients.device)]
            batch.absorb([chosen[k] for k in absorbing], taken)
        inverting = [chosen[k] for k, matrix in enumerate(matrices) if matrix.root_due]
        if inverting:
            batch.invert(inverting)
        if not any(matrix.rooted for matrix in matrices):
            return gradients
        return batch.precondition(chosen, gradients)

    def check_failures(self) -> None:
        """Raise RuntimeError if a factor's statistics or roots have failed ``max_failures`` times in a row.

        Reads the counts from the device, so it is called after statistics and root steps only.
        """
        if not any(pool.worst_failures() >= pool.options.max_failures for pool in self.pools):
            return
        for (index, block), sides in self._places.items():
            for side, (pool, at) in zip(("left", "right"), sides, strict=True):
                failures = int(pool.tensors["failures"][at].max())
                if failures >= pool.options.max_failures:
                    raise RuntimeError(
                        f"the {side} preconditioner of {self.matrices[index].name}, block at row {block.row}, column "
                        f"{block.column} ({block.rows} x {block.columns}), failed to update {failures} times in a row "
                        f"(max_failures={pool.options.max_failures}): its gradients or statistics are not finite; "
                        "lower the learning rate, clip gradients or raise matrix_eps"
                    )

    def to_bytes(self, index: int) -> Tensor:
        """Everything there is to know of one matrix's preconditioner, as uint8 (packed_bytes,): its place in time, then
        the factors of its blocks in order, left before right."""
        matrix = self.matrices[index]
        header = torch.frombuffer(bytearray(_HEADER.pack(matrix.step, matrix.rooted)), dtype=torch.uint8)
        factors = [pool.to_bytes(at) for pool, at in self._factors_of(index)]
        return torch.cat([header.to(matrix.device), *factors])

    def from_bytes(self, index: int, data: Tensor) -> None:
        """Restore what :meth:`to_bytes` gave for a matrix of the same shape and options."""
        matrix = self.matrices[index]
        data = data.to(matrix.device)
        matrix.step, matrix.rooted = read_header(data)
        start = _HEADER.size
        for pool, at in self._factors_of(index):
            size = factor_bytes(pool.order, pool.options)
            pool.from_bytes(at, data[start : start + size])
            start += size

    def _factors_of(self, index: int) -> Iterator[Place]:
        for block in self.matrices[index].blocks:
            yield from self._places[index, block]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)
