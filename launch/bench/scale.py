"""Compute what Shampoo4 would do in worlds of many ranks, from its own plans; no other process is started."""

from __future__ import annotations

import argparse
import os
import statistics
import time
import tracemalloc
from collections.abc import Iterable, Sequence

import torch
from memory.models import Shapes, parameter_count, shapes_of, title
from memory.rules import Layout
from plots import number_table, write_json
from rich.console import Console
from rich.table import Table

from sharded_shampoo4.base import Base
from sharded_shampoo4.comm.exchange import wire_dtype
from sharded_shampoo4.memory import base_sizes, copies_of, shard_all
from sharded_shampoo4.numerics.matrix import Matrix
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.planning.plan import Plan, PlannedMatrix
from sharded_shampoo4.planning.routes import Part, Routes, Way
from sharded_shampoo4.presets import apply_preset

from .measure import Row

MODELS = ("vit-base", "llama-7b")
HOSTS = ("ddp", "fsdp2", "hsdp")
AGREEMENTS = 2  # of all ranks, on the host, in every step: which gradients exist, and whether anything has failed
DTYPE = torch.float32  # of the parameters
DEVICE = torch.device("meta")  # for which batches are as large as for an accelerator


def compare_worlds(flags: argparse.Namespace, console: Console) -> None:
    """Plan every world, print a table for each model, write scale.json."""
    options = PreconditionerOptions.of_call(apply_preset({"method": flags.method}))
    about = {"method": flags.method, "torch": torch.__version__, "load_before": os.getloadavg()[0]}
    models = []
    for name in flags.models:
        shapes, rows = shapes_of(name), []
        for layout in worlds(flags.world_sizes, flags.hosts, flags.node_size):
            print(f"planning {title(name)}: {layout}, {layout.world_size} ranks", flush=True)
            rows.append(simulate(shapes, layout, options, flags.trace_memory))
        models.append({"model": name, "parameters": parameter_count(shapes), "worlds": rows})
        console.print(world_table(rows, f"{title(name)}, {parameter_count(shapes):,} parameters, {flags.method}"))
    write_json(flags.output_dir / "scale.json", {**about, "models": models})


def worlds(world_sizes: Iterable[int], hosts: Iterable[str], node_size: int) -> list[Layout]:
    """List the hosts at each number of ranks. One rank has no host; HSDP shards within nodes and needs several."""
    return [
        Layout(host, size, size // node_size if host == "hsdp" else None)
        for host in ("none", *hosts)
        for size in world_sizes
        if (host == "none") == (size == 1) and not (host == "hsdp" and (size % node_size or size == node_size))
    ]


def simulate(shapes: Shapes, layout: Layout, options: PreconditionerOptions, trace_memory: bool = False) -> Row:
    """Make the plan of a world. Return figures of an ordinary step, in which every parameter has a gradient.

    Messages, pieces and the time for routes are those of one rank: the one with the most matrix work, and of
    several such ranks the one nearest to the middle.

    Args:
        shapes: of the parameters.
        layout: host and number of ranks.
        options: of all parameters.
        trace_memory: whether to measure the peak of the memory for planning, which makes it several times as slow.
    """
    world = _World(shapes, layout, options)
    size = layout.world_size
    if trace_memory:
        tracemalloc.start()
    begun = time.perf_counter()
    plan = Plan(world.planned, size)
    between = time.perf_counter()
    loads = plan.loads()
    rank = max(range(size), key=lambda one: (loads[one], -abs(one - size // 2)))
    everything = (True,) * len(world.planned)
    parts = Routes(plan, rank).parts(everything, everything)
    ended = time.perf_counter()
    peak = tracemalloc.get_traced_memory()[1] if trace_memory else None
    tracemalloc.stop()

    element = wire_dtype([DTYPE], [options.exchange_dtype == "bfloat16"]).itemsize
    sent = [element * count for count in plan.elements_sent()]
    grafted = any(matrix.grafting == "parameter" for matrix in world.matrices)
    ways = [way for part in parts for way in (part.gradients, part.directions)]
    collectives = {
        "all_to_all": len(ways) if len(plan.mates(rank)) > 1 else 0,
        "all_gather": sum(way.shared is not None for way in ways),
        "all_reduce": int(grafted),
        "on_host": AGREEMENTS,
    }
    return {
        "host": layout.host,
        "replicas": layout.replicas,
        "ranks": size,
        "rank": rank,
        "plan_seconds": between - begun,
        "routes_seconds": ended - between,
        "planning_bytes": peak,
        "blocks": len(plan.blocks),
        "balance": max(loads) * size / sum(loads),
        "rounds": len(parts),
        "collectives": collectives if size > 1 else dict.fromkeys(collectives, 0),
        "sent_bytes": {"mean": statistics.mean(sent), "most": max(sent)},
        **_messages(plan, parts, rank, element),
        "state_bytes": max(world.state_bytes(plan)),
    }


class _World:
    """The matrices of a model, and how a host spreads them."""

    def __init__(self, shapes: Shapes, layout: Layout, options: PreconditionerOptions) -> None:
        self.layout = layout
        copies = copies_of(layout.host, layout.world_size, layout.replicas)
        self.sharding = shard_all(layout.host, list(shapes.values()), layout.world_size, copies)
        self.matrices: list[Matrix] = []
        self.planned: list[PlannedMatrix] = []
        self.alone: list[bool] = []  # parameters without states of the base
        for (name, shape), shards in zip(shapes.items(), self.sharding.shards, strict=True):
            matrix = Matrix.of(name, shape, options, DEVICE, DTYPE)
            self.alone.append(matrix is not None and options.method == "soap")
            if matrix is not None:
                self.matrices.append(matrix)
                self.planned.append(matrix.planned(shards))

    def state_bytes(self, plan: Plan) -> list[int]:
        """Count the bytes of every rank's states, AdamW's among them."""
        kept = Base("adamw", 1e-3).bytes_on_ranks(DTYPE, base_sizes(self.layout.host, self.sharding, self.alone))
        for (index, block), owner in zip(plan.blocks, plan.owners, strict=True):
            kept[owner] += self.matrices[index].block_bytes(block)
        return kept


def _messages(plan: Plan, parts: Sequence[Part], rank: int, element: int) -> Row:
    """Measure the largest messages of a rank, of elements of so many bytes, and count its copies in and out of them."""
    ways = [way for part in parts for way in (part.gradients, part.directions)]

    def received(way: Way) -> int:
        return sum(way.received) if way.shared is None else way.shared * len(plan.twins.of(rank))

    return {
        "largest_message_bytes": {
            "sent": element * max(way.shared or sum(way.sent) for way in ways),
            "received": element * max(map(received, ways)),
        },
        "most_receivers": max(sum(map(bool, way.sent)) for way in ways),
        "pieces": sum(len(copies) for way in ways for copies in (way.pack, way.unpack, way.here)),
    }


def world_table(rows: Sequence[Row], caption: str) -> Table:
    """Make the table of a model, a line for each world."""
    table = number_table(caption, "host", (
        "ranks", "plan\ns", "routes\ns", "busiest\n/ mean", "rounds", "calls,\n+ host", "MB sent\nmean", "\nmost",
        "message\nMB out", "\nMB in", "to\nranks", "pieces", "state\nMB", "rank",
    ))  # fmt: skip
    for row in rows:
        copies = f" {row['replicas']}x{row['ranks'] // row['replicas']}" if row["replicas"] else ""
        seconds = (f"{row[name]:.2f}" for name in ("plan_seconds", "routes_seconds"))
        all_to_all, all_gather, all_reduce, on_host = row["collectives"].values()
        sizes = (f"{size / 1e6:.1f}" for size in (*row["sent_bytes"].values(), *row["largest_message_bytes"].values()))
        table.add_row(
            row["host"] + copies, str(row["ranks"]), *seconds, f"{row['balance']:.3f}", str(row["rounds"]),
            f"{all_to_all + all_gather + all_reduce} + {on_host}", *sizes, str(row["most_receivers"]),
            str(row["pieces"]), f"{row['state_bytes'] / 1e6:.1f}", str(row["rank"]),
        )  # fmt: skip
    return table
