"""Factors as bytes: the whole preconditioner of a matrix as one vector, or one rank's pieces of it.

The vector is a header, how far the preconditioner has come, and then block by block the left and the right factor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .comm.ranks import Ranks
from .layout import sharded_dimension
from .numerics.matrix import Matrix
from .numerics.preconditioner import fresh_block
from .options import CUTTING, FORMER_CUTTING, PreconditionerOptions
from .placement import local_tensor, placements_of
from .planning.blocks import Block
from .planning.plan import Owned
from .planning.views import matrix_view

if TYPE_CHECKING:
    from .distributor import Distributor

_HEADER = struct.Struct("<qq")  # steps taken, root intervals passed


def packed_bytes(matrix: Matrix) -> int:
    """Return the length of a matrix's vector."""
    return _HEADER.size + matrix.nbytes


def packed_ranges(matrix: Matrix) -> Iterator[tuple[Block, slice]]:
    """Return every block, and the place of its factors in the vector."""
    start = _HEADER.size
    for block in matrix.blocks:
        stop = start + matrix.block_bytes(block)
        yield block, slice(start, stop)
        start = stop


def _header(matrix: Matrix) -> Tensor:
    return torch.frombuffer(bytearray(_HEADER.pack(matrix.step, matrix.roots)), dtype=torch.uint8)


def fresh_bytes(matrix: Matrix) -> Tensor:
    """Return the vector of a preconditioner that has taken no step."""
    return torch.cat([_header(matrix).to(matrix.device), *(fresh_block(matrix, block) for block in matrix.blocks)])


# -- of a distributor --------------------------------------------------------------------------------------------------


def pack(distributor: Distributor, index: int) -> Tensor:
    """Return a matrix's whole preconditioner as one uint8 vector, on every rank; collective."""
    matrix, ranks, owner_of = distributor.matrices[index], distributor.ranks, distributor.plan.owner_of
    ranges = [(owner_of[Owned(index, block)], block, place) for block, place in packed_ranges(matrix)]
    sizes = [sum(s.stop - s.start for owner, _, s in ranges if owner == rank) for rank in range(ranks.size)]
    with ranks.together():
        packed = torch.empty(packed_bytes(matrix), dtype=torch.uint8, device=matrix.device)
        packed[: _HEADER.size] = _header(matrix)
        mine = distributor.own_blocks(index).values()
        own = torch.cat([packed[:0], *map(distributor.preconditioner.to_bytes, mine)])
    parts = ranks.gather_bytes(own, sizes)
    starts = [0] * ranks.size
    for owner, block, place in ranges:
        size = matrix.block_bytes(block)
        packed[place] = parts[owner][starts[owner] : starts[owner] + size]
        starts[owner] += size
    return packed


def unpack(distributor: Distributor, index: int, packed: Tensor) -> None:
    """Restore this rank's part of what :func:`pack` gave, here or on any other number of ranks."""
    matrix = distributor.matrices[index]
    packed = packed.to(matrix.device)
    matrix.step, matrix.roots = _HEADER.unpack(bytes(packed[: _HEADER.size].tolist()))
    for block, place in packed_ranges(matrix):
        owned = Owned(index, block)
        if distributor.plan.owner_of[owned] == distributor.ranks.rank:
            distributor.preconditioner.from_bytes(owned, packed[place])


def pack_pieces(distributor: Distributor, index: int) -> PackedPieces:
    """Return this rank's part of a matrix's preconditioner."""
    matrix, mine = distributor.matrices[index], distributor.own_blocks(index)
    factors = [distributor.preconditioner.to_bytes(owned) for owned in mine.values()]
    data = torch.cat([_header(matrix).to(matrix.device), *factors])
    return PackedPieces(matrix.options, matrix.shape, list(mine), data)


# -- loaded, but not yet distributed -----------------------------------------------------------------------------------


@dataclass
class PackedState:
    """A parameter's preconditioner as bytes, and the options that shaped them."""

    options: PreconditionerOptions
    data: Tensor  # uint8 (packed_bytes,), whole or a DTensor

    def full(self, matrix: Matrix, ranks: Ranks) -> Tensor:
        """Return the whole of the bytes on every rank; collective if they are sharded."""
        if not hasattr(self.data, "full_tensor"):
            return self.data
        data: Any = self.data
        whole: Tensor = data.to(matrix.device).full_tensor()  # the host's part may not be able to travel
        return whole

    def check(self, matrix: Matrix) -> None:
        """Raise ValueError, naming the parameter, unless the bytes are those of ``matrix``."""
        _check_options(self.options, matrix)
        size = packed_bytes(matrix)
        if self.data.dtype != torch.uint8 or self.data.shape != (size,):
            raise ValueError(
                f"the stored preconditioner of {matrix.name} does not belong to a matrix of shape {matrix.shape}: "
                f"{size} bytes were expected, not {self.data.numel()} elements of {self.data.dtype}"
            )


@dataclass
class PackedPieces:
    """One rank's part of a parameter's preconditioner, and the options that shaped its bytes."""

    options: PreconditionerOptions
    shape: tuple[int, int]  # of the matrix
    blocks: list[int]  # numbers of the blocks that are there
    data: Tensor  # uint8: the header, then the factors of those blocks

    def full(self, matrix: Matrix, ranks: Ranks) -> Tensor:
        """Return the whole of the bytes on every rank, put together from the parts of all; collective.

        Raises ValueError, on every rank alike, unless the parts belong together.
        """
        header = _HEADER.size
        everyone = ranks.gather(self.blocks)
        found = sorted(number for blocks in everyone for number in blocks)
        if found != list(range(len(matrix.blocks))):
            raise ValueError(
                f"the ranks have loaded blocks {found} of the preconditioner of {matrix.name}, which has "
                f"{len(matrix.blocks)}: every rank must load what the same number of ranks have saved"
            )
        sizes = [[matrix.block_bytes(matrix.blocks[number]) for number in blocks] for blocks in everyone]
        mine = self.data[header:].to(matrix.device)
        parts = ranks.gather_bytes(mine, [sum(size) for size in sizes])
        cut: dict[int, Tensor] = {}
        for blocks, size, part in zip(everyone, sizes, parts, strict=True):
            cut.update(zip(blocks, part.split(size), strict=True))
        return torch.cat([self.data[:header].to(matrix.device), *(cut[number] for number in sorted(cut))])

    def check(self, matrix: Matrix) -> None:
        """Raise ValueError, naming the parameter, unless the bytes are those of ``matrix``."""
        _check_options(self.options, matrix)
        if self.shape != matrix.shape:
            raise ValueError(
                f"the stored preconditioner of {matrix.name} belongs to a matrix of shape {self.shape}, not of "
                f"{matrix.shape}"
            )
        known = range(len(matrix.blocks))
        if not set(self.blocks) <= set(known) or self.data.dtype != torch.uint8:
            raise ValueError(f"the stored preconditioner of {matrix.name} has blocks {self.blocks} of {len(known)}")
        size = _HEADER.size + sum(matrix.block_bytes(matrix.blocks[number]) for number in self.blocks)
        if self.data.shape != (size,):
            raise ValueError(
                f"the stored preconditioner of {matrix.name} has {self.data.numel()} bytes where {size} were expected"
            )

    def as_plain(self) -> dict[str, Any]:
        """Return everything but the options, to stand in a state_dict."""
        return {"shape": self.shape, "blocks": self.blocks, "data": self.data}

    @classmethod
    def of_plain(cls, options: PreconditionerOptions, stored: Mapping[str, Any]) -> PackedPieces:
        """Undo :meth:`as_plain`."""
        rows, columns = stored["shape"]
        return cls(options, (rows, columns), list(stored["blocks"]), stored["data"].detach().clone())


def check_that_ranks_agree(ranks: Ranks, stored: Mapping[str, PackedState | PackedPieces | None]) -> None:
    """Raise ValueError, on every rank alike, unless all ranks have stored bytes of the same parameters and steps.

    Of a sharded vector only those ranks can tell the step that hold its first bytes.
    """
    headers = {name: _header_of(entry.data) for name, entry in stored.items() if entry is not None}
    everyone: list[dict[str, bytes | None]] = ranks.gather(headers)
    for rank, found in enumerate(everyone):
        if found.keys() != everyone[0].keys():
            name = min(found.keys() ^ everyone[0].keys())
            having = "has" if name in found else "has not"
            raise ValueError(f"rank {rank} {having} loaded a preconditioner of {name}, unlike rank 0")
    for name in everyone[0]:
        known = [(rank, header) for rank, found in enumerate(everyone) if (header := found[name]) is not None]
        for rank, header in known:
            if header != known[0][1]:
                raise ValueError(
                    f"the ranks have loaded preconditioners of {name} from different steps: {_words(*known[0])}, "
                    f"{_words(rank, header)}"
                )


def _header_of(data: Tensor) -> bytes | None:
    """The header of a whole or sharded vector of bytes, if this rank holds it."""
    placements = placements_of(data)
    if placements is not None:
        coordinate = data.device_mesh.get_coordinate()  # type: ignore[attr-defined]
        cuts = [sharded_dimension(placement) is not None for placement in placements]
        if coordinate is None or any(cut and place for cut, place in zip(cuts, coordinate, strict=True)):
            return None
    header = bytes(local_tensor(data)[: _HEADER.size].tolist())
    return header if len(header) == _HEADER.size else None


def _words(rank: int, header: bytes) -> str:
    step, roots = _HEADER.unpack(header)
    return f"rank {rank} from step {step} ({roots} refreshes)"


def check_same_bytes(old: Matrix, new: Matrix) -> None:
    """Raise ValueError, naming the parameter, unless the factors of ``old`` can serve ``new``."""
    _check_options(old.options, new)
    if old.shape != new.shape:
        raise ValueError(f"the shape of {new.name} was {old.shape} and is now {new.shape}")


def _check_options(stored: PreconditionerOptions, matrix: Matrix) -> None:
    difference = shaping_difference(stored, matrix.options, [(matrix.name, matrix.whole)])
    if difference:
        raise ValueError(f"the stored preconditioner of {matrix.name} has {difference}")


def refuse_former_levels(version: int, stored: PreconditionerOptions, what: str) -> None:
    """Raise ValueError if bytes of this format have codes for levels that are no longer there."""
    if version < 2 and stored.precondition and stored.bits != 32 and stored.codebook == "normal":
        raise ValueError(
            f"{what} has codebook='normal' in format {version}, whose levels had no zero and can no longer be read: "
            "go on with the version of Shampoo4 that wrote it, or begin with new states"
        )


def shaping_difference(
    stored: PreconditionerOptions, wanted: PreconditionerOptions, parameters: Iterable[tuple[str, Sequence[int]]]
) -> str:
    """Name the options whose different values make stored bytes unreadable, in words; empty if there are none.

    ``parameters`` are names and shapes: options that cut all of them alike make no difference.
    """
    old, new = stored.shaping_bytes(), wanted.shaping_bytes()
    names = [name for name in {**old, **new} if name in old and name in new and old[name] != new[name]]
    differ = any(name in CUTTING for name in names)
    if differ and all(_cut(name, shape, stored) == _cut(name, shape, wanted) for name, shape in parameters):
        names = [name for name in names if name not in CUTTING]
    found = ", ".join(f"{name}={old[name]!r} where this optimizer has {name}={new[name]!r}" for name in names)
    if names and all(name in FORMER_CUTTING and old[name] == FORMER_CUTTING[name] for name in names):
        former = ", ".join(f"{name}={old[name]!r}" for name in names)
        return f"{found}, as earlier versions cut matrices: make it with {former}"
    return found


def _cut(name: str, shape: Sequence[int], options: PreconditionerOptions) -> tuple[Any, ...] | None:
    """All that decides on the blocks of a parameter."""
    view = matrix_view(name, shape, options)
    if view is None:
        return None
    parts = view.parts or (view.shape[0],)
    width, cutting = view.shape[1], options.cutting
    return view.shape, [(cutting.sides(rows, width), cutting.lengths(rows, width)) for rows in parts]
