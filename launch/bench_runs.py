"""How benchmark.py measures: optimizers that take turns in one process, and models that take turns on ranks."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from bench_optimizers import CHOICES, OURS, Choice, first_line, random_batch, state_bytes, vit
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile
from wrapping import layers_of, wrap

from sharded_shampoo4 import Shampoo4

GRADIENTS, IMAGES = 4, 16  # batches that are replayed, and images of each
IMPORTS = ["sharded_shampoo4", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.modeling_utils"]

Row = dict[str, Any]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up_steps(interval: int) -> int:
    """Two intervals and what some are late: a peer's first refresh may come a step after the interval."""
    return 2 * interval + 2


def stance(choice: Choice, eager: bool) -> AbstractContextManager[Any]:
    """Within, torch.compile compiles unless ``eager``."""
    return torch.compiler.set_stance("force_eager") if eager and choice.compiles else nullcontext()


def is_ordinary(name: str, step: int, interval: int) -> bool:
    """Whether a step of ours, counted from 1, has no more to do than others. The staggered mode's are all alike."""
    return name == "shampoo4-staggered" or step % interval != 0


def gradients_of_a_vit(flags: argparse.Namespace) -> list[list[Tensor]]:
    """Gradients of every parameter for some batches of random images."""
    model = vit(flags.hidden_size, flags.num_hidden_layers).to(flags.device)
    replayed = []
    for _ in range(GRADIENTS):
        images, labels = random_batch(IMAGES, flags.device)
        model.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        replayed.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return replayed


# -- one process -------------------------------------------------------------------------------------------------------


class Contender:
    """An optimizer with its own copy of the parameters, and what was measured of it."""

    def __init__(self, choice: Choice, shapes_of: list[Tensor], flags: argparse.Namespace) -> None:
        self.choice, self.device = choice, flags.device
        self.interval = flags.interval if choice.refreshes else 1  # after which steps are alike again
        self.eager = flags.eager or (choice.slow_to_compile and flags.device.type == "cpu" and not flags.compile_all)
        self.parameters = [nn.Parameter(torch.zeros_like(like)) for like in shapes_of]
        self.steps = 0
        self.transient: list[int] = []  # bytes
        self.cpu: dict[int, float] = {}  # milliseconds by step
        self.wall: dict[int, float] = {}
        self.error = ""
        with self.surviving():
            self.optimizer = choice.make(self.parameters, flags.interval)

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Note the error of a peer, which then takes no more steps; ours and torch's raise."""
        try:
            yield
        except Exception as error:
            if not self.choice.is_peer:
                raise
            self.error = first_line(error)

    def set_gradients(self, replayed: list[list[Tensor]]) -> None:
        """Those of the next step."""
        self.steps += 1
        for parameter, gradient in zip(self.parameters, replayed[self.steps % len(replayed)], strict=True):
            parameter.grad = gradient.clone()

    def step(self) -> None:
        with stance(self.choice, self.eager):
            self.optimizer.step()

    def warm_up(self, replayed: list[list[Tensor]]) -> None:
        """States are made and code is compiled; the memory of the last interval's steps is measured."""
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
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        self.step()
        self._wait()
        self.cpu[self.steps] = 1e3 * (time.process_time() - cpu)
        self.wall[self.steps] = 1e3 * (time.perf_counter() - wall)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def row(self, name: str) -> Row:
        """Everything that was measured, for the table and the JSON file."""
        graph = ("eager" if self.eager else "compiled") if self.choice.compiles else ""
        row: Row = {"name": name, "label": self.choice.label, "version": self.choice.version(), "graph": graph}
        if self.error:
            return {**row, "error": self.error}
        elements = sum(p.numel() for p in self.parameters)
        kept = state_bytes(self.optimizer, [t for p in self.parameters for t in (p, p.grad) if t is not None])
        return {
            **row,
            "cpu_ms": median_and_worst(self.cpu.values()),
            "wall_ms": median_and_worst(self.wall.values()),
            "state_bytes": kept,
            "state_bytes_per_parameter": kept / elements,
            "transient_bytes": {"ordinary": statistics.median(self.transient), "refresh": max(self.transient)},
            "steps": {"cpu_ms": self.cpu, "wall_ms": self.wall},
        }


def median_and_worst(times: Collection[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "worst": max(times)}


def take_turns(contenders: list[Contender], replayed: list[list[Tensor]], steps: int) -> None:
    """Timed steps, one of each contender after another; garbage is collected between them, not within."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            for contender in contenders:
                with contender.surviving():
                    if not contender.error:
                        contender.timed_step(replayed)
            gc.collect()
    finally:
        gc.enable()


def watched(device: torch.device) -> AbstractContextManager[Any]:
    """Where a CPU's memory that may be freed in a later ``most_allocated`` must be allocated: torch's profiler reports
    the end of those blocks only whose begin it has seen."""
    if device.type == "cuda":
        return nullcontext()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def most_allocated(step: Callable[[], object], device: torch.device) -> int:
    """Bytes at the moment of ``step`` when most are allocated, beyond those at its start.

    It sees what torch's allocators give; not the scratch space inside BLAS and LAPACK.
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


# -- on ranks ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What all ranks do."""

    names: tuple[str, ...]  # of CHOICES: AdamW's and ours
    hidden_size: int
    layers: int
    host: str
    interval: int
    steps: int
    eager: bool


class Measured(NamedTuple):
    """Of an optimizer on a rank: for each timed step, by its number, the seconds of its parts and the megabytes sent;
    bytes of the states."""

    steps: dict[int, dict[str, float]]
    preconditioner: int
    base: int


def on_ranks(job: Job, world_size: int) -> dict[str, list[Measured]]:
    """What each rank, a process with one thread, has measured of each optimizer."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_on_a_rank, (world_size, job, folder), nprocs=world_size, start_method="forkserver")
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(world_size)]
    return {name: [Measured(*rank[name]) for rank in ranks] for name in job.names}


def _on_a_rank(rank: int, world_size: int, job: Job, folder: str) -> None:
    """Train a model with each optimizer, in turns, and leave what was measured in ``folder``."""
    from measure_link import PARTS, Clock

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    clock = Clock()
    clock.watch()
    models = {}
    for name in job.names:
        model = vit(job.hidden_size, job.layers)
        models[name] = wrap(model, job.host, layers_of(model))
    optimizers: dict[str, Any] = {
        name: CHOICES[name].make(list(model.parameters()), job.interval) for name, model in models.items()
    }
    torch.manual_seed(1 + rank)
    batches = [random_batch(IMAGES, torch.device("cpu")) for _ in range(GRADIENTS)]
    taken: dict[str, dict[int, dict[str, float]]] = {name: {} for name in job.names}
    for step in range(1, warm_up_steps(job.interval) + job.steps + 1):
        images, labels = batches[step % GRADIENTS]
        for name, model in models.items():
            clock.spent = dict.fromkeys(PARTS, 0.0)
            dist.barrier()
            with clock.count("step"):
                model(pixel_values=images, labels=labels).loss.backward()
                processor = time.process_time()
                with clock.count("optimizer"), stance(CHOICES[name], job.eager):
                    optimizers[name].step()
                processor = time.process_time() - processor
            model.zero_grad()
            if step > warm_up_steps(job.interval):
                taken[name][step] = {**clock.spent, "processor": processor}
    torch.save(
        {name: (taken[name], *_states(optimizers[name], models[name])) for name in job.names}, f"{folder}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def _states(optimizer: Any, model: nn.Module) -> tuple[int, int]:
    """Bytes on this rank of factors, and of everything else that the optimizer keeps."""
    if isinstance(optimizer, Shampoo4):
        counted = optimizer.state_bytes()
        return counted["preconditioner"], counted["base"]
    return 0, state_bytes(optimizer, model.parameters())


def rank_row(name: str, ranks: Sequence[Measured], interval: int) -> Row:
    """One optimizer on all ranks. A step's time is the slowest rank's; milliseconds and bytes."""
    numbers = ranks[0].steps.keys()
    slowest = {
        step: {part: max(rank.steps[step][part] for rank in ranks) for part in ranks[0].steps[step]} for step in numbers
    }
    ordinary = [step for step in numbers if name not in OURS or is_ordinary(name, step, interval)] or list(numbers)

    def milliseconds(part: str) -> dict[str, float]:
        return median_and_worst([1e3 * spent[part] for spent in slowest.values()])

    def median(part: str) -> float:
        return statistics.median(slowest[step][part] for step in ordinary)

    sent = [round(1e6 * statistics.median(rank.steps[step]["megabytes"] for step in ordinary)) for rank in ranks]
    kept = [rank.preconditioner + rank.base for rank in ranks]
    owned = [rank.preconditioner for rank in ranks] if name in OURS else kept
    return {
        "name": name,
        "label": CHOICES[name].label,
        "step_ms": milliseconds("step"),
        "optimizer_ms": milliseconds("optimizer"),
        "optimizer_cpu_ms": milliseconds("processor"),
        "exchange_share": median("exchange") / median("step"),
        "sent_bytes": sent,
        "preconditioner_bytes": [rank.preconditioner for rank in ranks],
        "state_bytes": kept,
        "balance": max(owned) * len(owned) / sum(owned),
    }
