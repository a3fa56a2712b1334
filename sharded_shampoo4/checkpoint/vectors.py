"""What torch.distributed.checkpoint (DCP) stores: vectors of which each rank has an interval, and their keys.

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

VALUES, UNTRAINED, FACTORS = "values", "untrained", "factors"  # kinds, beside the names of the base's states


def key(kind: str, name: str) -> str:
    """Return the key of a parameter's or buffer's vector."""
    return f"{kind}/{name}"


def block_key(name: str, block: Block) -> str:
    """Return the key of a block's factors."""
    return f"{FACTORS}/{name}/{block.row},{block.column}"


class Interval(Tensor):
    """A rank's part of a vector that is spread over ranks, as DCP takes it: elements ``start`` on of ``total``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    start: int
    total: int

    @staticmethod
    def of(part: Tensor, start: int, total: int) -> Interval:
        """Return ``part``, a vector, as an interval, in the same memory."""
        interval = part.detach().as_subclass(Interval)
        interval.start, interval.total = start, total
        return interval

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the whole vector, which is what DCP compares with what is stored."""
        return torch.Size([self.total]) if dim is None else self.total

    def _part(self) -> Tensor:
        return self.as_subclass(Tensor)

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self._part().numel()]))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._part())
        data = TensorWriteData(self._chunk(), properties, torch.Size([self.total]))
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._part()


def on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor, whole or an interval, to the host's memory."""
    if isinstance(tensor, Interval):
        return Interval.of(tensor._part().to("cpu", copy=True), tensor.start, tensor.total)
    return tensor.to("cpu", copy=True)
