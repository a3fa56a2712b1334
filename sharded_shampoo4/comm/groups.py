"""Process groups on the host, of Shampoo4's own, and words that ranks leave in a group's store for those that wait."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HOST_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
_COUNTS_OF_OUR_GROUPS = 1_000_000  # more groups of the same ranks than a program makes
_MADE: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()  # groups made beside a group


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of the same ranks that all optimizers on ``group`` share; the first call is collective.

    It is never the user's own: collectives that do not match must not meet those of DistributedDataParallel.
    """
    found = _HOST_GROUPS.get(group)
    if found is None or not is_alive(found):
        found = _HOST_GROUPS[group] = new_host_group(group)
    return found


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether ``group`` was not destroyed."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError, ValueError):
        return False
    return True


def new_host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks, which waits for a rank that has died as long as ``group`` does; collective."""
    return new_group(group, dist.get_process_group_ranks(group), "gloo")


def new_group(group: dist.ProcessGroup, members: Sequence[int], backend: str) -> dist.ProcessGroup:
    """A group of some ranks of ``group``, which are the ``members``, by their ranks among all processes; collective.

    All ranks of ``group`` call it together, each with the members of its own new group.
    """
    number, timeout = _MADE.get(group, 0), _timeout(group)
    with _same_name(group, number, timeout), _connecting_when_needed():
        made: dist.ProcessGroup = dist.new_group(
            list(members), timeout=timeout, backend=backend, use_local_synchronization=True
        )
    _MADE[group] = number + 1
    return made


@contextlib.contextmanager
def _connecting_when_needed() -> Iterator[None]:
    """Let gloo connect two ranks when one has something to tell the other, not all ranks with all when it begins.

    A thousand ranks would otherwise need a thousand connections each.
    """
    name = "TORCH_GLOO_LAZY_INIT"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def maximum(values: Tensor, group: dist.ProcessGroup) -> None:
    """Make ``values``, on the host, the largest of all ranks, element by element; collective.

    In each of log2(ranks) rounds a rank tells another one what it knows, twice as far away as in the round before:
    10 messages one after another for 1,024 ranks, where gloo's ``all_reduce`` has 2,046.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    distance = 1
    while distance < size:
        told = values.clone()
        sending = dist.isend(values, group=group, group_dst=(rank + distance) % size)
        dist.recv(told, group=group, group_src=(rank - distance) % size)
        if sending is not None:
            sending.wait()
        torch.maximum(values, told, out=values)
        distance *= 2


def serves(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend of ``group`` for tensors on ``device``; empty if it has none."""
    config = str(dist.get_backend_config(group))  # "cpu:gloo,cuda:nccl"
    backends = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return backends.get(device.type, "")


def leave_word(group: dist.ProcessGroup | None, text: str) -> None:
    """Leave ``text`` for the other ranks of ``group``; empty: take it back. What fails is passed over."""
    with contextlib.suppress(Exception):
        store = _store(group)
        store.set(_key(dist.get_rank(group)), f"{time.time()} {text}" if text else "")


def words(group: dist.ProcessGroup | None) -> dict[int, tuple[str, float]]:
    """What each rank has left, and how many seconds ago; empty if the store cannot be read."""
    found: dict[int, tuple[str, float]] = {}
    with contextlib.suppress(Exception):
        store = _store(group)
        for rank in range(dist.get_world_size(group)):
            if store.check([_key(rank)]):
                when, _, text = store.get(_key(rank)).decode().partition(" ")
                if text:
                    found[rank] = (text, max(0.0, time.time() - float(when)))
    return found


def _key(rank: int) -> str:
    return f"shampoo4/word/{rank}"


def _store(group: dist.ProcessGroup | None) -> Any:
    asked: Any = group if group is not None else dist.group.WORLD
    return dist.distributed_c10d._get_process_group_store(asked)


@contextlib.contextmanager
def _same_name(group: dist.ProcessGroup, number: int, timeout: timedelta | None) -> Iterator[None]:
    """Let torch give a group that only its own ranks make the same name on all of them.

    The name follows from the number of groups that a rank is in, from torch 2.14 on from the number that it has made.
    Both may differ; without this they would wait for each other under different names. The numbers come back, since
    the names of groups that all ranks make follow from the second.
    """
    world: Any = dist.distributed_c10d._world
    names: dict[Any, Any] = world.pg_names
    store, size, rank = _store(group), dist.get_world_size(group), dist.get_rank(group)
    keys = [f"shampoo4/groups/{number}/{other}" for other in range(size)]
    store.set(keys[rank], str(len(names)))
    store.wait(keys, *([timeout] if timeout else []))
    most = max(int(store.get(key)) for key in keys)
    placeholders = [object() for _ in range(most - len(names))]
    names.update(dict.fromkeys(placeholders, ""))
    count, world.group_count = world.group_count, _COUNTS_OF_OUR_GROUPS + most
    try:
        yield
    finally:
        world.group_count = count
        for placeholder in placeholders:
            del names[placeholder]


def _timeout(group: Any) -> timedelta | None:
    """How long collectives of ``group`` wait; None if it does not say."""
    backend = group._get_backend(group._device_types[0])
    return getattr(getattr(backend, "options", None), "_timeout", None)
