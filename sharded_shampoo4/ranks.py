"""The ranks that share the parameters, and what they tell each other on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """A process group, or a process by itself (``group`` None)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.host_group = _host_group(group) if group is not None else None

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def any(self, flags: Sequence[bool]) -> tuple[bool, ...]:
        """Flag by flag, whether any rank has it set. Waits for no accelerator."""
        if self.group is None:
            return tuple(flags)
        joined = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        dist.all_reduce(joined, dist.ReduceOp.MAX, group=self.host_group)
        return tuple(bool(flag) for flag in joined.tolist())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises in here, every rank raises at its end; collective, and nothing in it may be."""
        error: Exception | None = None
        try:
            yield
        except (OSError, TypeError, ValueError) as found:
            error = found
        self.raise_together(error)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what the first rank with an error has to say; nothing if none has."""
        for rank, found in enumerate(self.gather(error)):
            if found is not None:
                raise found if rank == self.rank else type(found)(f"rank {rank}: {found}")

    def beside(self) -> Ranks:
        """The same ranks with a group of their own on the host, for what another thread does; collective."""
        if self.group is None:
            return Ranks(None)
        return Ranks(_new_host_group(self.group))

    def gather_bytes(self, data: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """``data``, uint8 vectors of ``sizes`` bytes, of every rank."""
        if self.group is None:
            return [data]
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
        padded[: len(data)] = data
        joined = torch.empty(longest * self.size, dtype=torch.uint8, device=data.device)
        dist.all_gather_into_tensor(joined, padded, group=self.group)
        return (
            [part[:size] for part, size in zip(joined.split(longest), sizes, strict=True)]
            if longest
            else [data] * self.size
        )

    def sum(self, values: Tensor) -> None:
        """Add up ``values`` over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that can reduce tensors on the host: ``group`` itself, or a gloo group beside it."""
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    return _new_host_group(group)


def _new_host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks, which waits for a rank that has died as long as ``group`` does."""
    made: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(group), timeout=_timeout(group), backend="gloo", use_local_synchronization=True
    )
    return made


def _timeout(group: Any) -> timedelta | None:
    """How long collectives of ``group`` wait; None if it does not say."""
    backend = group._get_backend(group._device_types[0])
    return getattr(getattr(backend, "options", None), "_timeout", None)
