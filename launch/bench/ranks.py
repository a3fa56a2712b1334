"""Measure AdamW and Shampoo4 on ranks that train the same model: step times, bytes sent, and the parts of a step."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from sharded_shampoo4 import Shampoo4

from .measure import GRADIENTS, IMAGES, Row, finish, median_and_worst, stance, state_bytes, warm_up_steps
from .optimizers import CHOICES, OURS, is_ordinary, random_batch, vit

PARTS = ("gather", "statistics", "roots", "precondition", "graft", "send_back", "base")  # the library's labels
PROFILED = ("step", "optimizer", *PARTS, "transfers", "overlapped")
STEP, OPTIMIZER = "benchmark::step", "benchmark::optimizer"
_IMPORTS = ["sharded_shampoo4", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.modeling_utils"]


class Job(NamedTuple):
    """What all ranks do."""

    names: tuple[str, ...]  # of CHOICES: AdamW's and ours
    hidden_size: int
    layers: int
    host: str
    device: str
    interval: int
    steps: int
    eager: bool
    trace: Path | None  # folder


def measure_ranks(job: Job, ranks: int) -> list[Row]:
    """Measure on processes that torchrun has started, or else on ``ranks`` new ones; a row for each optimizer.

    Under torchrun every rank gets the rows.
    """
    if "RANK" in os.environ:
        return train(job, "env://")
    multiprocessing.set_forkserver_preload(_IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_started, (ranks, job, folder), nprocs=ranks, start_method="forkserver")
        rows: list[Row] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def _started(rank: int, ranks: int, job: Job, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    rows = train(job, f"file://{folder}/store")
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def train(job: Job, init_method: str) -> list[Row]:
    """Train a model with each optimizer, in turns, then each for a profiled interval; rows of all ranks' figures."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(job.device, int(os.environ["LOCAL_RANK"])) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    runs = [Run(name, job, device) for name in job.names]
    timed = warm_up_steps(job.interval) + job.steps
    for _ in range(timed):
        for run in runs:
            run.step()
    mine = {run.name: run.measured(warm_up_steps(job.interval) + 1, run.profiled(timed)) for run in runs}
    every: list[dict[str, Any]] = [{} for _ in range(size)]
    dist.all_gather_object(every, mine)
    dist.barrier()
    dist.destroy_process_group()
    return [rank_row(name, [one[name] for one in every], job.interval) for name in job.names]


class Run:
    """A model that this rank trains with the others."""

    def __init__(self, name: str, job: Job, device: torch.device) -> None:
        self.name, self.job, self.device = name, job, device
        self.model = wrap(vit(job.hidden_size, job.layers).to(device), job.host)
        self.optimizer: Any = CHOICES[name].make(list(self.model.parameters()), job.interval)
        torch.manual_seed(1 + dist.get_rank())
        self.batches = [random_batch(IMAGES, device) for _ in range(GRADIENTS)]
        self.steps: dict[int, dict[str, float]] = {}  # by number: seconds, and bytes sent

    def step(self) -> None:
        """Take a step of which all ranks see the start."""
        sent, number = self._sent(), len(self.steps) + 1
        dist.barrier()
        begun = time.perf_counter()
        with record_function(STEP):
            self.model(**self.batches[number % GRADIENTS]).loss.backward()
            finish(self.device)
            optimizer, processor = time.perf_counter(), time.process_time()
            with record_function(OPTIMIZER), stance(CHOICES[self.name], self.job.eager):
                self.optimizer.step()
                finish(self.device)
            ended = time.perf_counter()
        self.steps[number] = {
            "step": ended - begun,
            "optimizer": ended - optimizer,
            "processor": time.process_time() - processor,
            "sent": self._sent() - sent,
        }
        self.model.zero_grad()

    def _sent(self) -> int:
        return self.optimizer.traffic_bytes() if isinstance(self.optimizer, Shampoo4) else 0

    def profiled(self, taken: int) -> dict[int, dict[str, float]]:
        """Take an interval's steps with torch's profiler; the seconds of their parts, by the steps' numbers."""
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(self.job.interval):
                self.step()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(self.job.trace or folder, f"{self.name}-rank{dist.get_rank()}.json")
            recorded.export_chrome_trace(str(file))
            steps = parts_of(json.loads(file.read_text())["traceEvents"])
        return dict(enumerate(steps, taken + 1))

    def measured(self, first: int, profiled: dict[int, dict[str, float]]) -> dict[str, Any]:
        """What the other ranks are told: steps from ``first`` on that no profiler slowed, profiled ones, and bytes."""
        kept = {"preconditioner": 0, "base": 0}
        if isinstance(self.optimizer, Shampoo4):
            kept = self.optimizer.state_bytes()
        else:
            kept["base"] = state_bytes(self.optimizer, self.model.parameters())
        steps = {number: spent for number, spent in self.steps.items() if number >= first and number not in profiled}
        return {"steps": steps, "profiled": profiled, **kept}


def wrap(model: nn.Module, host: str) -> nn.Module:
    """The model under DDP, FSDP2, or HSDP, which shards within a node and copies between nodes."""
    if host == "ddp":
        return DistributedDataParallel(model)
    ranks, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    shape, names = ((ranks // local, local), ("replicate", "shard")) if host == "hsdp" else ((ranks,), ("shard",))
    mesh = init_device_mesh(next(model.parameters()).device.type, shape, mesh_dim_names=names)
    for layer in [module for module in model.modules() if type(module).__name__ == "ViTLayer"]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# -- what is made of it ------------------------------------------------------------------------------------------------


def parts_of(events: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Read from a trace the seconds of every step in all, in the optimizer, and in each part that has a label.

    ``"transfers"`` are those in which gloo was at an exchange, ``"overlapped"`` those of them in which this rank
    computed roots, statistics or directions.
    """
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            begin = 1e-6 * float(event["ts"])
            spans[event["name"]].append((begin, begin + 1e-6 * float(event["dur"])))
    computing = [span for part in ("statistics", "roots", "precondition") for span in spans[f"shampoo4::{part}"]]
    steps = []
    for step in sorted(spans[STEP]):
        transfers = [span for span in spans["gloo:all_to_all"] if step[0] <= span[0] <= step[1]]
        steps.append(
            {
                "step": step[1] - step[0],
                "optimizer": _shared([step], spans[OPTIMIZER]),
                **{part: _shared([step], spans[f"shampoo4::{part}"]) for part in PARTS},
                "transfers": _shared([step], transfers),
                "overlapped": _shared(transfers, computing),
            }
        )
    return steps


def _shared(spans: Iterable[tuple[float, float]], others: Iterable[tuple[float, float]]) -> float:
    """Add up how long each of ``spans`` shares with each of ``others``."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in itertools.product(spans, others))


def rank_row(name: str, ranks: Sequence[dict[str, Any]], interval: int) -> Row:
    """One optimizer on all ranks, in milliseconds and bytes. A step and its parts take as long as on the slowest."""
    slowest = _slowest([rank["steps"] for rank in ranks])
    profiled = _slowest([rank["profiled"] for rank in ranks])
    ordinary = _ordinary(name, slowest, interval)

    def milliseconds(part: str) -> dict[str, float]:
        return median_and_worst([1e3 * spent[part] for spent in slowest.values()])

    kinds = {"ordinary": _ordinary(name, profiled, interval)}
    kinds["refresh"] = [step for step in profiled if step not in kinds["ordinary"]] or kinds["ordinary"]
    parts = {
        kind: {part: 1e3 * statistics.median(profiled[step][part] for step in steps) for part in PROFILED}
        for kind, steps in kinds.items()
    }
    kept = [rank["preconditioner"] + rank["base"] for rank in ranks]
    owned = [rank["preconditioner"] for rank in ranks] if name in OURS else kept
    return {
        "name": name,
        "label": CHOICES[name].label,
        "step_ms": milliseconds("step"),
        "optimizer_ms": milliseconds("optimizer"),
        "optimizer_cpu_ms": milliseconds("processor"),
        "exchange_share": (parts["ordinary"]["gather"] + parts["ordinary"]["send_back"]) / parts["ordinary"]["step"],
        "parts_ms": parts,
        "sent_bytes": [round(statistics.median(rank["steps"][step]["sent"] for step in ordinary)) for rank in ranks],
        "preconditioner_bytes": [rank["preconditioner"] for rank in ranks],
        "state_bytes": kept,
        "balance": max(owned) * len(owned) / sum(owned),
    }


def _slowest(ranks: Sequence[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    return {step: {part: max(rank[step][part] for rank in ranks) for part in spent} for step, spent in ranks[0].items()}


def _ordinary(name: str, steps: Iterable[int], interval: int) -> list[int]:
    return [step for step in steps if name not in OURS or is_ordinary(name, step, interval)] or list(steps)
