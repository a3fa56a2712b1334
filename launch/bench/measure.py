"""Measure optimizers that take turns in one process: times, bytes kept, bytes allocated."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .optimizers import Choice, first_line, random_batch, vit

GRADIENTS, IMAGES = 4, 16  # batches that are replayed, and images of each

Row = dict[str, Any]


def gradients_of_a_vit(flags: argparse.Namespace) -> list[list[Tensor]]:
    """Compute the gradients of every parameter for some batches of random images."""
    model = vit(flags.hidden_size, flags.num_hidden_layers).to(flags.device)
    replayed = []
    for _ in range(GRADIENTS):
        model.zero_grad()
        model(**random_batch(IMAGES, flags.device)).loss.backward()
        replayed.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return replayed


def measure(choices: dict[str, Choice], replayed: list[list[Tensor]], flags: argparse.Namespace) -> list[Row]:
    """Warm up and time optimizers, each on its own copy of the parameters. Return a row for each, in their order.

    Garbage is collected between steps, never within one.
    """
    found = {name: Contender(choice, replayed[0], flags) for name, choice in choices.items()}
    for contender in found.values():
        print(f"warming up: {contender.choice.label}", flush=True)
        contender.attempt(lambda one: one.warm_up(replayed))
    gc.collect()
    gc.disable()
    try:
        for _ in range(flags.steps):
            for contender in found.values():
                contender.attempt(lambda one: one.timed_step(replayed))
            gc.collect()
    finally:
        gc.enable()
    return [contender.row(name) for name, contender in found.items()]


class Contender:
    """An optimizer with its own copy of the parameters, and its measured times and bytes."""

    def __init__(self, choice: Choice, shapes_of: list[Tensor], flags: argparse.Namespace) -> None:
        self.choice, self.device = choice, flags.device
        self.interval = flags.interval if choice.refreshes else 1  # after which steps are alike again
        self.eager = flags.eager or (choice.slow_to_compile and flags.device.type == "cpu")
        self.parameters = [nn.Parameter(torch.zeros_like(like)) for like in shapes_of]
        self.steps = 0
        self.transient: list[int] = []  # bytes
        self.cpu: dict[int, float] = {}  # milliseconds by step
        self.wall: dict[int, float] = {}
        self.error = ""
        self.optimizer: Any = None
        self.attempt(lambda one: one.make(flags.interval))

    def attempt(self, action: Callable[[Contender], object]) -> None:
        """Do something unless a peer has failed before. An error of a peer is kept; ours and torch's are raised."""
        try:
            if not self.error:
                action(self)
        except Exception as error:
            if not self.choice.is_peer:
                raise
            self.error = first_line(error)

    def make(self, interval: int) -> None:
        self.optimizer = self.choice.make(self.parameters, interval)

    def set_gradients(self, replayed: list[list[Tensor]]) -> None:
        """Set the gradients of the next step."""
        self.steps += 1
        for parameter, gradient in zip(self.parameters, replayed[self.steps % len(replayed)], strict=True):
            parameter.grad = gradient.clone()

    def step(self) -> None:
        with stance(self.choice, self.eager):
            self.optimizer.step()

    def warm_up(self, replayed: list[list[Tensor]]) -> None:
        """Take steps that make states and compile code. Measure the memory of the last interval's steps."""
        for remaining in reversed(range(warm_up_steps(self.interval))):
            with watched(self.device):
                self.set_gradients(replayed)
            if remaining < self.interval:
                self.transient.append(most_allocated(self.step, self.device))
            else:
                with watched(self.device):
                    self.step()

    def timed_step(self, replayed: list[list[Tensor]]) -> None:
        self.set_gradients(replayed)
        finish(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        self.step()
        finish(self.device)
        self.cpu[self.steps] = 1e3 * (time.process_time() - cpu)
        self.wall[self.steps] = 1e3 * (time.perf_counter() - wall)

    def row(self, name: str) -> Row:
        """Return all measured figures, for the table and the JSON file."""
        graph = ("eager" if self.eager else "compiled") if self.choice.compiles else ""
        row: Row = {"name": name, "label": self.choice.label, "version": self.choice.version(), "graph": graph}
        if self.error:
            return {**row, "error": self.error}
        kept = state_bytes(self.optimizer, [t for p in self.parameters for t in (p, p.grad) if t is not None])
        return {
            **row,
            "cpu_ms": median_and_worst(self.cpu.values()),
            "wall_ms": median_and_worst(self.wall.values()),
            "state_bytes": kept,
            "state_bytes_per_parameter": kept / sum(p.numel() for p in self.parameters),
            "transient_bytes": {"ordinary": statistics.median(self.transient), "refresh": max(self.transient)},
            "steps": {"cpu_ms": self.cpu, "wall_ms": self.wall},
        }


def warm_up_steps(interval: int) -> int:
    """Count the steps before timed ones: two intervals, and two steps since some peers refresh a step late."""
    return 2 * interval + 2


def stance(choice: Choice, eager: bool) -> AbstractContextManager[Any]:
    """Make a context in which torch.compile compiles unless ``eager``."""
    return torch.compiler.set_stance("force_eager") if eager and choice.compiles else nullcontext()


def finish(device: torch.device) -> None:
    """Wait until an accelerator has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_and_worst(times: Collection[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "worst": max(times)}


def setting(flags: argparse.Namespace) -> dict[str, Any]:
    """Describe the run, for its JSON file."""
    names = ("hidden_size", "num_hidden_layers", "host", "steps", "interval", "threads")
    return {
        **{name: getattr(flags, name) for name in names if hasattr(flags, name)},
        "device": torch.cuda.get_device_name(flags.device) if flags.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


# -- bytes -------------------------------------------------------------------------------------------------------------

_NO_TENSORS = (type, types.ModuleType, types.FunctionType, types.FrameType)  # objects not to look into


def state_bytes(holder: object, apart: Iterable[Tensor]) -> int:
    """Count the bytes of all tensors that ``holder`` refers to, however deep, except in closures.

    Shared memory counts once. The memory of ``apart``, the parameters and gradients, does not count. Tensor subclasses
    count as the tensors inside them.
    """
    others = {storage.data_ptr() for tensor in apart for storage in _storages(tensor)}
    kept = {storage.data_ptr(): storage.nbytes() for tensor in _tensors(holder) for storage in _storages(tensor)}
    return sum(size for address, size in kept.items() if address not in others)


def _tensors(holder: object) -> Iterator[Tensor]:
    seen: dict[int, object] = {}  # keeps them alive, so that no id comes twice
    waiting = [holder]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _NO_TENSORS):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
        else:
            waiting += gc.get_referents(item)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor also has a mesh
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()


def watched(device: torch.device) -> AbstractContextManager[Any]:
    """Make a context for allocations on a CPU that a later ``most_allocated`` may see freed.

    torch's profiler reports a free only if it has seen the allocation.
    """
    if device.type == "cuda":
        return nullcontext()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def most_allocated(step: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of allocated bytes during ``step``, beyond those at its start.

    Only torch's allocators are seen, not the scratch space inside BLAS and LAPACK.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with watched(device) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"]))
    return max(itertools.accumulate((int(e["args"]["Bytes"]) for e in changes), initial=0))
