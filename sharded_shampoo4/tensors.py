"""Tensors in optimizer states: those behind subclasses and shards, their bytes, and low-bit ones.

Low-bit optimizers keep moments as codes, scales and maps: torchao's in one tensor subclass that looks like the float
tensor that it stands for and can dequantize itself, bitsandbytes' each in a tensor of its own. Nothing here knows
either by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .placement import local_tensor


def plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Find all tensors with a storage of their own in (nested) containers and tensor subclasses, those of this rank."""
    for value in values:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors(getattr(value, name) for name in names)
        elif isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            yield from (value._indices(), value._values())
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from plain_tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from plain_tensors(value)


def bytes_by_tensor(values: Iterable[Any]) -> dict[Hashable, int]:
    """Weigh every tensor that :func:`plain_tensors` finds; one that stands in several places is there once.

    The keys tell tensors apart for as long as they live.
    """
    found: dict[Hashable, int] = {}
    for tensor in plain_tensors(values):
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())
        found[place] = tensor.numel() * tensor.element_size()
    return found


def tensor_bytes(states: Iterable[Any]) -> int:
    """Weigh all tensors in (nested) containers, in bytes; those of this rank where they are sharded.

    Low-bit tensors count with their codes, scales and maps; a tensor that several states share counts once.
    """
    return sum(bytes_by_tensor(states).values())


def is_low_bit(value: Any) -> bool:
    """Tell whether this is a tensor, sharded or not, that keeps codes and knows what floats they stand for."""
    if not isinstance(value, Tensor):
        return False
    local = local_tensor(value)
    own = getattr(type(local), "dequantize", Tensor.dequantize)  # every tensor has the method, for torch's own types
    return is_traceable_wrapper_subclass(local) and own is not Tensor.dequantize


def floats(value: Tensor) -> Tensor:
    """Read an elementwise state's numbers, flattened, of this rank: in float32 where they are kept in low precision.

    Sparse ones, such as SGD's momentum of sparse gradients, are made dense.
    """
    local = local_tensor(value).detach()
    local = local if local.layout == torch.strided else local.to_dense()
    numbers: Tensor = local.dequantize().float() if is_low_bit(local) else local
    return numbers.reshape(-1)
