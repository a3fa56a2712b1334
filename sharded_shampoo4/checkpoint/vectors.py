"""Vectors that are sharded over the ranks, as torch.distributed.checkpoint (DCP) stores them, and their keys.

A key is a kind and a name: ``values/NAME``, ``STATE/NAME`` for a state of the base optimizer, ``untrained/NAME``, and
``factors/NAME/ROW,COLUMN`` for the factors of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..planning.blocks import Block
from ..planning.shards import Rectangle, Shard, shard_pieces

VALUES, UNTRAINED, FACTORS = "values", "untrained", "factors"  # kinds, beside the names of the base's states


def key(kind: str, name: str) -> str:
    """Return the key of a parameter's or buffer's vector."""
    return f"{kind}/{name}"


def block_key(name: str, block: Block) -> str:
    """Return the key of a block's factors."""
    return f"{FACTORS}/{name}/{block.row},{block.column}"


class Interval(Tensor):
    """A rank's part of a vector that is spread over ranks, as DCP takes it: a shard's elements of ``total``.

    DCP knows it as a vector, or as a table with rows of ``width`` elements, of which it has up to three rectangles. A
    table is written where the shard is a rectangle of one: as a vector it would be an entry for each of its rows. Where
    such a shard is read from something else, all between its first and its last element is read, and the rest dropped:
    DCP reads all of an entry for each interval that it takes from it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    shard: Shard
    total: int
    width: int
    found: dict[tuple[int, ...], Tensor] | None
    between: Tensor | None

    @staticmethod
    def of(part: Tensor, shard: Shard, total: int) -> Interval:
        """Return ``part``, a contiguous vector, as the elements of a shard, in the same memory."""
        interval = part.detach().as_subclass(Interval)
        interval.shard, interval.total, interval.width = shard, total, shard.stride
        interval.found = interval.between = None
        return interval

    def read_from(self, stored: torch.Size) -> None:
        """Be known to DCP as what is stored: a vector, or a table of this size."""
        if stored.numel() == self.total and len(stored) <= 2:  # DCP refuses all else
            self.width, self.found = stored[1] if len(stored) == 2 else 0, None
        first, last = self.shard.start, self.shard.stop + (self.shard.repeats - 1) * self.shard.stride
        if self.shard.stride not in (0, self.width):
            self.between = torch.empty(last - first, dtype=self._part().dtype, device="cpu")

    def settle(self) -> None:
        """Keep what was read, and drop what was read beside it."""
        if self.between is not None:
            size = self.shard.repeats, self.shard.stop - self.shard.start
            self._part().view(size).copy_(self.between.as_strided(size, (self.shard.stride, 1)))
            self.found = self.between = None

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the whole vector or table, which is what DCP compares with what is stored."""
        size = torch.Size([self.total // self.width, self.width] if self.width else [self.total])
        return size if dim is None else size[dim]

    def _part(self) -> Tensor:
        return self.as_subclass(Tensor)

    def _memory(self) -> tuple[Tensor, Shard]:
        """What DCP writes from or reads into, and which elements these are."""
        if self.between is None:
            return self._part(), self.shard
        return self.between, Shard(self.shard.start, self.shard.start + len(self.between))

    def _chunks(self) -> dict[tuple[int, ...], Tensor]:
        """The elements of each part of the vector or table that this rank has, by where the part begins."""
        if self.found is None:
            memory, shard = self._memory()
            if self.width:
                table = Block(0, 0, self.total // self.width, self.width)
                pieces = shard_pieces(table, self.width, shard)
                self.found = {(piece.row, piece.column): self._rectangle(piece) for piece in pieces}
            else:
                self.found = {(shard.start,): memory}
        return self.found

    def _rectangle(self, piece: Rectangle) -> Tensor:
        """The elements of a rectangle of the table."""
        memory, shard = self._memory()
        first = memory.storage_offset() + shard.place(piece.row * self.width + piece.column)
        return memory.as_strided((piece.rows, piece.columns), (shard.row_width(self.width), 1), first)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._part())
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(start), chunk.shape) for start, chunk in self._chunks().items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._chunks()[tuple(index.offset)]


def on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor, whole or an interval, to the host's memory."""
    if isinstance(tensor, Interval):
        return Interval.of(tensor._part().to("cpu", copy=True), tensor.shard, tensor.total)
    return tensor.to("cpu", copy=True)
