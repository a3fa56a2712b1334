"""Measure AdamW and Shampoo4 on ranks that train the same model: step times, bytes sent, and the parts of a step."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plots import number_table, write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from sharded_shampoo4 import Shampoo4

from .measure import (
    GRADIENTS,
    IMAGES,
    Row,
    finish,
    median_and_worst,
    setting,
    stance,
    state_bytes,
    warm_up_steps,
)
from .optimizers import CHOICES, OURS, is_ordinary, random_batch, vit

PARTS = ("gather", "statistics", "roots", "precondition", "graft", "send_back", "base")  # the library's labels
PROFILED = ("step", "optimizer", *PARTS, "transfers", "overlapped")
STEP, OPTIMIZER = "benchmark::step", "benchmark::optimizer"


def compare_ranks(flags: argparse.Namespace, console: Console) -> None:
    """Train with AdamW and ours on ranks, print the tables, write ranks.json."""
    about = setting(flags)
    if flags.trace:
        flags.trace.mkdir(parents=True, exist_ok=True)
    rows = train(flags)
    if int(os.environ["RANK"]):
        return
    about["ranks"] = len(rows[0]["state_bytes"])
    console.print(rank_table(rows, about))
    console.print(parts_table(rows))
    write_json(flags.output_dir / "ranks.json", {**about, "optimizers": rows})


def train(flags: argparse.Namespace) -> list[Row]:
    """Train a model with each optimizer in turns, then each for a profiled interval. Return rows for all ranks."""
    device, backend = flags.device, "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    names = [name for name in ("adamw", *OURS) if name == "adamw" or name in flags.only]
    runs = [Run(name, flags, device) for name in names]
    warm = warm_up_steps(flags.interval)
    timed = warm + flags.steps
    for _ in range(timed):
        for run in runs:
            run.step()
    mine = {run.name: run.measured(warm + 1, run.profiled(timed)) for run in runs}
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    dist.barrier()
    dist.destroy_process_group()
    return [rank_row(name, [one[name] for one in every], flags.interval) for name in names]


class Run:
    """A model that all ranks train together, and its optimizer."""

    def __init__(self, name: str, flags: argparse.Namespace, device: torch.device) -> None:
        self.name, self.flags, self.device = name, flags, device
        self.model = wrap(vit(flags.hidden_size, flags.num_hidden_layers).to(device), flags.host)
        self.optimizer: Any = CHOICES[name].make(list(self.model.parameters()), flags.interval)
        torch.manual_seed(1 + dist.get_rank())
        self.batches = [random_batch(IMAGES, device) for _ in range(GRADIENTS)]
        self.steps: dict[int, dict[str, float]] = {}  # by number: seconds, and bytes sent

    def step(self) -> None:
        """Take a step that all ranks begin together."""
        sent, number = self._sent(), len(self.steps) + 1
        dist.barrier()
        begun = time.perf_counter()
        with record_function(STEP):
            self.model(**self.batches[number % GRADIENTS]).loss.backward()
            finish(self.device)
            optimizer, processor = time.perf_counter(), time.process_time()
            with record_function(OPTIMIZER), stance(CHOICES[self.name], self.flags.eager):
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
        """Profile an interval of steps. Return the seconds of their parts, by the steps' numbers."""
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(self.flags.interval):
                self.step()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(self.flags.trace or folder, f"{self.name}-rank{dist.get_rank()}.json")
            recorded.export_chrome_trace(str(file))
            steps = parts_of(json.loads(file.read_text())["traceEvents"])
        return dict(enumerate(steps, taken + 1))

    def measured(self, first: int, profiled: dict[int, dict[str, float]]) -> dict[str, Any]:
        """Return this rank's figures: timed steps from ``first`` on, profiled steps, and bytes of states."""
        kept = {"preconditioner": 0, "base": 0}
        if isinstance(self.optimizer, Shampoo4):
            kept = self.optimizer.state_bytes()
        else:
            kept["base"] = state_bytes(self.optimizer, self.model.parameters())
        steps = {number: spent for number, spent in self.steps.items() if number >= first and number not in profiled}
        return {"steps": steps, "profiled": profiled, **kept}


def wrap(model: nn.Module, host: str) -> nn.Module:
    """Wrap the model in DDP, FSDP2, or HSDP, which shards within a node and copies between nodes."""
    if host == "ddp":
        return DistributedDataParallel(model)
    ranks, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    shape, names = ((ranks // local, local), ("replicate", "shard")) if host == "hsdp" else ((ranks,), ("shard",))
    mesh = init_device_mesh(next(model.parameters()).device.type, shape, mesh_dim_names=names)
    for layer in [module for module in model.modules() if type(module).__name__ == "ViTLayer"]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# -- figures -----------------------------------------------------------------------------------------------------------


def parts_of(events: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Read from a trace the seconds of every step, of its optimizer, and of each part with a label.

    ``"transfers"`` are the seconds in which gloo exchanges, ``"overlapped"`` the part of them in which this rank
    computes statistics, roots or directions.
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
    """Add up the time that each of ``spans`` shares with each of ``others``."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in itertools.product(spans, others))


def rank_row(name: str, ranks: Sequence[dict[str, Any]], interval: int) -> Row:
    """Make the row of an optimizer, in ms and bytes. Times of a step and its parts are those of the slowest rank."""
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


# -- tables ------------------------------------------------------------------------------------------------------------


def rank_table(rows: list[Row], about: dict[str, Any]) -> Table:
    """Make the table, a line for each optimizer."""
    title = (
        f"ViT, hidden {about['hidden_size']}, {about['num_hidden_layers']} layers; {about['host']} on {about['ranks']} "
        f"ranks; refresh every {about['interval']} steps, {about['steps']} steps; "
        f"load before {about['load_before']:.1f}"
    )
    found = number_table(title, "optimizer", (
        "step ms\nmedian", "\nworst", "of it optimizer\nmedian", "\nworst", "CPU ms\nmedian", "\nworst",
        "exchange /\nstep", "MB sent\nmost", "\nmean", "state MB\nmost", "most /\nmean",
    ))  # fmt: skip
    for row in rows:
        spans = [row[which] for which in ("step_ms", "optimizer_ms", "optimizer_cpu_ms")]
        times = [f"{span[kind]:.1f}" for span in spans for kind in ("median", "worst")]
        exchange = ["", "", ""]
        if row["name"] in OURS:
            most, mean = max(row["sent_bytes"]), statistics.mean(row["sent_bytes"])
            exchange = [f"{row['exchange_share']:.1%}", f"{most / 1e6:.2f}", f"{mean / 1e6:.2f}"]
        found.add_row(row["label"], *times, *exchange, f"{max(row['state_bytes']) / 1e6:.2f}", f"{row['balance']:.3f}")
    return found


def parts_table(rows: list[Row]) -> Table:
    """Make a table of the parts of our steps without and with a refresh, in ms on the slowest rank."""
    found = number_table("milliseconds of profiled steps, on the slowest rank", "optimizer", PROFILED)
    for row in rows:
        for kind, spent in row["parts_ms"].items():
            if row["name"] in OURS:
                found.add_row(f"{row['label']}, {kind}", *(f"{spent[part]:.1f}" for part in PROFILED))
    return found
