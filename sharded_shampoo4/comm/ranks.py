"""The ranks that share the parameters, and what they tell each other on the host."""

from __future__ import annotations

import builtins
import contextlib
import pickle
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups

T = TypeVar("T")

OWN_MODELS = (
    "where every rank trains a model of its own, Shampoo4(..., process_group='alone') lets it; where only some ranks "
    "share one, process_group= takes their group"
)
_CAUSES = (
    "Look for: a process that has died, or raised outside of the optimizer; uneven inputs, where a rank had fewer "
    "batches (with torch.distributed.algorithms.join or Accelerate's join_uneven_inputs: Join([model, optimizer], "
    "throw_on_early_termination=True); otherwise a loader with drop_last=True); ranks that do not call step(), "
    "state_dict() and checkpoint functions equally often; or a model that only some ranks train: "
) + OWN_MODELS
# Its name from torch 2.13 on, and before.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_FLAGS = 8  # that travel in one collective

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()  # Ranks on each host group


class Ranks:
    """A process group, or a process by itself (``group`` None).

    Every message on the host begins with a record of fixed size that tells in which call a rank is: ranks in different
    calls raise, and never take each other's data for their own.

    Attributes:
        group: as the user made it; for tensors on accelerators.
        host_group: a gloo group of the same ranks, of our own; for the host.
        calling: the call that a rank is in.
        tried: devices on which everything that a step needs has been tried.
        bytes_sent: of gradients and directions, to other ranks, so far.
    """

    def __init__(self, group: dist.ProcessGroup | None, beside: bool = False) -> None:
        self.calling = "step()"
        self.bytes_sent = 0
        self._join(group, beside)

    def _join(self, group: dist.ProcessGroup | None, beside: bool) -> None:
        self.group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.tried: set[torch.device] = set()
        self._twins: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}  # by their ranks and backend
        self.host_group: dist.ProcessGroup | None = None
        self._number = 0  # counts the optimizers on a group: the same on every rank
        if group is not None:
            with self.explaining():
                self.host_group = groups.new_host_group(group) if beside else groups.host_group(group)
            self._number = _made.get(self.host_group, 0)
            _made[self.host_group] = self._number + 1

    @property
    def first(self) -> int | None:
        """The first of them, by its rank among all processes; None if these are all processes."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == self.size:
            return None
        return dist.get_rank() if self.group is None else min(dist.get_process_group_ranks(self.group))

    @property
    def gone(self) -> bool:
        """Whether the process group was destroyed."""
        return self.host_group is not None and not groups.is_alive(self.host_group)

    def renew(self, group: dist.ProcessGroup | None) -> None:
        """Go on with another ``group`` of as many ranks; collective. Raises RuntimeError if it is not like that."""
        size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        if (size, rank) != (self.size, self.rank):
            raise RuntimeError(
                f"this process was rank {self.rank} of {self.size} and is now rank {rank} of {size}, but the factors "
                "are spread over the ranks as they were: load a checkpoint into a new optimizer"
            )
        self._join(group, False)

    def meet(self, calling: str) -> None:
        """Begin a call; raises RuntimeError, on every rank, if they are in different ones."""
        self.calling = calling
        self.any([])

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""
        if self.group is None:
            return [value]
        return [pickle.loads(data) for data in self._gather(pickle.dumps(value))]

    def any(self, flags: Sequence[bool]) -> tuple[bool, ...]:
        """Flag by flag, whether any rank has it set. Waits for no accelerator."""
        if self.group is None:
            return tuple(flags)
        if len(flags) <= _FLAGS:
            return tuple(self._agree(0, flags)[1][: len(flags)])
        self._agree(len(flags))
        joined = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        self._maximum(joined)
        return tuple(bool(flag) for flag in joined.tolist())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises in here, every rank raises at its end; collective, and nothing in it may be."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        self.raise_together(error)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what the first rank with an error has to say; nothing if none has.

        A rank that has the same to say raises its own error.
        """
        if self.group is None:
            if error is not None:
                raise error
            return
        told = b"" if error is None else pickle.dumps((type(error).__module__, type(error).__qualname__, str(error)))
        for rank, data in enumerate(self._gather(told)):
            if data.startswith(pickle.PROTO):
                said = pickle.loads(data)
                if error is not None and said == pickle.loads(told):
                    raise error
                raise _rebuilt(rank, *said)

    def duplicate(self) -> Ranks:
        """The same ranks with a group of their own on the host, for what another thread does; collective."""
        return Ranks(self.group, beside=True)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def on(self, device: torch.device) -> dist.ProcessGroup | None:
        """The group for tensors on ``device``: our own wherever gloo carries them."""
        if self.group is None or device.type == "cpu":
            return self.host_group
        return self.host_group if groups.serves(self.group, device) in ("", "gloo") else self.group

    def check_device(self, name: str, device: torch.device) -> None:
        """Raise ValueError unless tensors on ``device``, where ``name`` is computed, can travel."""
        if self.group is None or device.type in ("cpu", "meta") or groups.serves(self.group, device):
            return
        raise ValueError(
            f"{name} is preconditioned on {device}, but the process group ({dist.get_backend_config(self.group)}) has "
            f'no backend for it: init_process_group("cpu:gloo,cuda:nccl") serves both the host and the accelerator'
        )

    def gather_bytes(self, data: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """``data``, uint8 vectors of ``sizes`` bytes, of every rank, without filling up the shorter ones."""
        if self.group is None:
            return [data]
        with self.together():
            parts = list(torch.empty(sum(sizes), dtype=torch.uint8, device=data.device).split(list(sizes)))
            parts[self.rank].copy_(data)
        with self.explaining():
            group, works = self.on(data.device), []
            for owner, part in enumerate(parts):
                if len(part):
                    works.append(dist.broadcast(part, group_src=owner, group=group, async_op=True))
            for work in works:
                work.wait()
        return parts

    def sum(self, values: Tensor) -> None:
        """Add up ``values`` over the ranks, in place."""
        if self.group is not None:
            with self.explaining():
                dist.all_reduce(values, group=self.on(values.device))

    def start_all_to_all(self, receive: Tensor, send: Tensor, sizes: list[int], sent: list[int]) -> dist.Work:
        """Start to send ``sent[r]`` elements to each rank r, and to receive ``sizes[r]`` from it."""
        with self.explaining():
            work: dist.Work = dist.all_to_all_single(
                receive, send, sizes, sent, group=self.on(send.device), async_op=True
            )
            return work

    def join_twins(self, twins: Sequence[int], device: torch.device) -> None:
        """Make the group for :meth:`start_all_gather` among ``twins``, if it is not there yet; collective."""
        key = tuple(twins), self._backend(device)
        if self.group is None or not 0 < len(twins) < self.size or key in self._twins:
            return
        with self.explaining():
            members = [dist.get_global_rank(self.group, rank) for rank in twins]
            self._twins[key] = groups.new_group(self.group, members, key[1])

    def start_all_gather(self, joined: Tensor, own: Tensor, twins: Sequence[int]) -> dist.Work:
        """Start to put what each of the ranks ``twins`` has as ``own`` one after another into ``joined``."""
        whole = len(twins) == self.size
        self.join_twins(twins, own.device)  # makes a group after the process group was replaced; otherwise does nothing
        group = self.on(own.device) if whole else self._twins[tuple(twins), self._backend(own.device)]
        with self.explaining():
            work: dist.Work = _all_gather(joined, own, group=group, async_op=True)
            return work

    def _backend(self, device: torch.device) -> str:
        """The backend of :meth:`on`."""
        if self.group is None or device.type == "cpu":
            return "gloo"
        return groups.serves(self.group, device) or "gloo"

    # -- on the host ---------------------------------------------------------------------------------------------------

    def _agree(self, length: int, flags: Sequence[bool] = ()) -> tuple[int, list[bool]]:
        """The largest ``length``, and flag by flag whether any rank has it set. Ranks in different calls raise."""
        code = zlib.crc32(f"{self._number} {self.calling}".encode())
        given = [*map(int, flags), *[0] * (_FLAGS - len(flags))]
        record = torch.tensor([code, -code, length, *given], dtype=torch.int64, device="cpu")
        self._maximum(record)
        largest, smallest, longest, *found = record.tolist()
        if largest + smallest:
            self._refuse_different_calls()
        return longest, [bool(flag) for flag in found]

    def _maximum(self, values: Tensor) -> None:
        assert self.host_group is not None
        with self.explaining():
            groups.maximum(values, self.host_group)

    def _refuse_different_calls(self) -> None:
        calls: list[Any] = [None] * self.size
        with self.explaining():
            dist.all_gather_object(calls, (self._number, self.calling), group=self.host_group)
        several = len({number for number, _ in calls}) > 1
        shown = [f"{call} of optimizer {number}" if several else call for number, call in calls]
        raise RuntimeError(
            f"ranks are in different calls of Shampoo4: {', '.join(f'rank {r}: {c}' for r, c in enumerate(shown))}; "
            "every rank of the group must make the same calls in the same order"
        )

    def _gather(self, data: bytes) -> list[bytes]:
        """``data`` of every rank, with zeros behind it up to the longest."""
        longest, _ = self._agree(len(data))
        if not longest:
            return [b""] * self.size
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self.explaining():
            dist.all_gather(parts, padded, group=self.host_group)
        return [part.numpy().tobytes() for part in parts]

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Say what to look for where a collective fails, as when it has waited too long for another rank."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            left = [
                f"Rank {rank} left Shampoo4 {ago:.0f} s ago with {text}."
                for rank, (text, ago) in groups.words(self.group).items()
                if rank != self.rank
            ]
            message = (
                f"rank {self.rank} has waited in vain for the other ranks of its group of {self.size} in "
                f"{self.calling} of Shampoo4 ({_first_line(error)}). {' '.join(left)}{' ' if left else ''}{_CAUSES}"
            )
            raise waited(RuntimeError(message)) from error


class DeferredErrors:
    """Keeps a rank in a call's collectives after something has failed on it, until all ranks raise together."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.error: Exception | None = None

    def attempt(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """What a local ``function`` gives; None from the first failure on, which is kept. Alone, it is raised."""
        if self.error is not None:
            return None
        if self._ranks.size == 1:
            return function(*arguments)
        try:
            return function(*arguments)
        except Exception as found:
            traceback.clear_frames(found.__traceback__)  # which would keep tensors alive
            self.error = found
            return None

    def buffer(self, make: Callable[[], Tensor]) -> Tensor:
        """Memory for a collective, tried again if it fails: by then that of the step has been let go."""
        made = self.attempt(make)
        return make() if made is None else made

    def raise_together(self) -> None:
        """Raise on every rank what has failed on any; collective."""
        self._ranks.raise_together(self.error)


def waited(error: RuntimeError) -> RuntimeError:
    """Mark the error of a rank that has waited for others: they need not hear of it."""
    error.shampoo4_waited = True  # type: ignore[attr-defined]
    return error


def has_waited(error: BaseException) -> bool:
    """Whether :func:`waited` has marked ``error``."""
    return hasattr(error, "shampoo4_waited")


def _rebuilt(rank: int, module: str, name: str, text: str) -> Exception:
    """Another rank's error: of its type, if that is known here and takes a message; otherwise a RuntimeError."""
    kind = getattr(builtins if module == "builtins" else sys.modules.get(module), name, None)
    message = f"rank {rank}: {text}"
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            error = kind(message)
            if message in str(error):
                return error
    return RuntimeError(f"rank {rank}: {name}: {text}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
