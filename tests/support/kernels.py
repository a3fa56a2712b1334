"""Counts, without a GPU, what a step asks of one: kernels, synchronizations, copies from the host, collectives.

Everything runs on the meta device, whose tensors have shapes but no data. Code that asks whether a tensor is on the CPU
gets the answer that a GPU gives, so the same branches run. This is counted:

* operators of aten that touch a tensor on the device, and among them views and allocations, which launch nothing;
* kernels: one for every other operator, one more for a reduction that first converts its input, and for ``_foreach_*``
  as many as torch's multi_tensor_apply launches. Kernels inside a factorization are not counted;
* synchronizations: the host waits for a number, or for a size that depends on numbers. A mask as an index counts
  always, though CUDA does not wait in ``x[mask] = 1.0``;
* bytes that kernels move: of all tensors that they are given and that they write. Of an expanded tensor what it holds,
  and of an index_select what it selects;
* copies from the host's memory, also those that torch makes of lists;
* collectives, and what is given to them. ``meta_ranks.py`` lets one rank call them without the others.

A meta tensor has no numbers, so every number that is asked for is the same ``answer``, and no element is ever selected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
_VIEWS = {"_unsafe_view", "lift", "lift_fresh"}  # that do not say so
_READS = {"_local_scalar_dense", "equal"}
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
_INDEXING = {"index", "index_put_", "_index_put_impl_"}
_CHECKS = {  # torch reads back whether they have succeeded, or how large a result is
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_unique2", "bincount", "linalg_eig", "unique_consecutive",
}  # fmt: skip
_CONVERTING = {"linalg_vector_norm", "mean", "prod", "sum"}  # with a dtype, they convert the whole input first

# MultiTensorApply.cuh: the tensors of one launch by the number of lists, its blocks, and the elements of a block.
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS_OF_A_LAUNCH = 320
_ELEMENTS_OF_A_BLOCK = 2**16


@dataclass
class Counts:
    """What some work asks of a device."""

    operators: int = 0
    views: int = 0  # among them, with allocations
    copies: int = 0  # from the host to the device
    kernels_by: Counter[str] = field(default_factory=Counter)
    moved_by: Counter[str] = field(default_factory=Counter)  # bytes
    synchronizations_by: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)  # on tensors of the device
    host_collectives: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # bytes given to the device's collectives

    @property
    def kernels(self) -> int:
        return sum(self.kernels_by.values())

    @property
    def moved(self) -> int:
        return sum(self.moved_by.values())

    @property
    def synchronizations(self) -> int:
        return sum(self.synchronizations_by.values())


class CountWork(TorchDispatchMode):
    """While it is on, counts into ``counts`` what any device but the CPU is asked to do."""

    def __init__(self, answer: int = 0) -> None:
        super().__init__()
        self.counts = Counts()
        self.answer = answer
        self._lists = _CountCopiesOfLists(self.counts)

    def __enter__(self) -> CountWork:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor: what it does with its local tensor comes here again
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            self._count_collective(name, args)
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        compute = self._result if any(map(_on_device, given)) else _plain_result
        result = compute(func, name, args, kwargs)
        if any(map(_on_device, [*given, *_tensors([result])])):
            self._count(func, name, args, kwargs, given, result)
        return result

    # -- what meta tensors cannot tell ---------------------------------------------------------------------------------

    def _result(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What an operator on the device gives. Counts it if the host waits for that."""
        first = args[0]
        waits = self.counts.synchronizations_by
        if name in _CHECKS:
            waits[name] += 1
        elif name in _READS:
            waits[name] += 1
            return torch.full((), self.answer, dtype=torch.bool if name == "equal" else first.dtype).item()
        elif name == "nonzero":
            waits[name] += 1
            return first.new_empty((0, first.ndim), dtype=torch.int64)
        elif name == "masked_select":
            waits[name] += 1
            return first.new_empty(0)
        elif name in _INDEXING and (masks := sum(map(_is_mask, args[1]))):
            waits[name] += masks
            return func(first, _without_masks(args[1])) if name == "index" else first
        elif name in _COPIES and not _writes_device(name, args, kwargs):
            return self._copy_to_host(name, args, kwargs)
        return func(*args, **kwargs)

    def _copy_to_host(self, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_to_copy":
            source = args[0]
            written = [torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)]
        else:
            written = list(_tensors(args[:1]))
        for tensor in written:
            tensor.fill_(self.answer)
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.counts.synchronizations_by[name] += len(written)
        return None if name == "_foreach_copy_" else written[0]

    # -- counting ------------------------------------------------------------------------------------------------------

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        counts = self.counts
        counts.operators += 1
        if func.is_view or name in _VIEWS or name in _ALLOCATIONS:
            counts.views += 1
        elif name in _COPIES and not _writes_device(name, args, kwargs):
            pass
        elif name in _COPIES and not all(map(_on_device, given)):
            counts.copies += sum(not _on_device(tensor) for tensor in given)
        elif name not in _READS:
            # A number on the host is an argument of a kernel, a tensor with dimensions must be copied.
            counts.copies += sum(not _on_device(tensor) and tensor.ndim > 0 for tensor in given)
            counts.kernels_by[name] += _launches(name, args, kwargs, result)
            written = list(_tensors([result])) or list(_tensors(args[:1]))  # _foreach_* in place return nothing
            read = [*given[1:], *written] if name == "index_select" else given
            counts.moved_by[name] += sum(map(_bytes_held, [*read, *written]))
            counts.moved_by[name] -= sum(map(_bytes_held, _tensors([kwargs.get("out")])))  # is not read

    def _count_collective(self, name: str, args: Any) -> None:
        tensors = list(_tensors(args))
        if not any(map(_on_device, tensors)):
            self.counts.host_collectives[name] += 1
            return
        given = tensors[1:] if name in ("alltoall_base_", "_allgather_base_", "_reduce_scatter_base_") else tensors
        self.counts.collectives[name] += 1
        self.counts.sent[name] += sum(tensor.nbytes for tensor in given)


class _CountCopiesOfLists(TorchFunctionMode):
    """Counts the tensors that torch makes of lists: on the host, and then it copies them, which no other mode sees."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            given = [*args, *kwargs.values()] if func is not Tensor.new_tensor else [*args[1:], *kwargs.values()]
            self.counts.copies += _on_device(result) and not _has_tensor(given)
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and _on_device(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.counts.copies += sum(isinstance(part, list) for part in index)
        return result


def _plain_result(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes_held(tensor: Tensor) -> int:
    """Count the bytes of a tensor in memory: the elements of an expanded dimension are the same one."""
    lengths = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(lengths) * tensor.element_size()


def _has_tensor(values: Iterable[Any]) -> bool:
    return next(_tensors(values), None) is not None


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _writes_device(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy is made on the device."""
    if name == "_to_copy":
        return torch.device(kwargs.get("device") or args[0].device).type != "cpu"
    return any(map(_on_device, _tensors(args[:1])))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``indices`` with an empty index for each dimension of a mask."""
    plain: list[Tensor | None] = []
    for index in indices:
        if index is not None and _is_mask(index):
            plain += [index.new_empty(0, dtype=torch.int64)] * index.ndim
        else:
            plain.append(index)
    return plain


# -- kernels of an operator --------------------------------------------------------------------------------------------


def _launches(name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Kernels of an operator that is neither a view nor a copy from the host."""
    if name.startswith("_foreach"):
        lists = [list(arg) for arg in args if isinstance(arg, (list, tuple)) and _has_tensor(arg[:1])]
        return _foreach_launches(name, lists if name.endswith("_") else [*lists, list(result)])
    written = list(_tensors([result]))
    if written and not any(tensor.numel() for tensor in written):
        return 0
    return 2 if name in _CONVERTING and kwargs.get("dtype") not in (None, args[0].dtype) else 1


def _foreach_launches(name: str, lists: list[list[Tensor]]) -> int:
    """Few, if corresponding tensors lie in memory alike and fill it, and all have the same type; else one a tensor."""
    first = lists[0]
    alike = all(
        one.shape == other.shape and one.stride() == other.stride()
        for others in lists[1:]
        for one, other in zip(first, others, strict=True)
    )
    types = {tensor.dtype for tensors in lists for tensor in tensors}
    if alike and all(map(_is_dense, first)) and (len(types) == 1 or name == "_foreach_copy_"):
        return launches([tensor.numel() for tensor in first], len(lists))
    return sum(tensor.numel() > 0 for tensor in first)


def launches(sizes: Iterable[int], lists: int) -> int:
    """Launches of multi_tensor_apply on ``lists`` lists of tensors of so many elements.

    >>> launches([1] * 110, 1), launches([1] * 111, 1), launches([320 * 2**16 + 1], 2)
    (1, 2, 2)
    """
    launched = tensors = blocks = 0
    for size in sizes:
        tensors += size > 0
        last = -(-size // _ELEMENTS_OF_A_BLOCK)
        for block in range(1, last + 1):
            blocks += 1
            if blocks == _BLOCKS_OF_A_LAUNCH or (block == last and tensors == _TENSORS_OF_A_LAUNCH[lists]):
                launched += 1
                blocks, tensors = 0, int(block < last)
    return launched + (blocks > 0)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
