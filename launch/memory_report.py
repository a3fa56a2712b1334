"""Memory of AdamW, 8-bit AdamW, Muon, 32-bit Shampoo and Shampoo4 on every rank, before anything is trained.

    python launch/memory_report.py                       tables: models x hosts x world sizes
    python launch/memory_report.py --largest 8 24        the largest ViT that fits on 8 GPUs of 24 GB, by optimizer

Figures are bytes of float32 weights, float32 gradients and optimizer states on the fullest rank, computed from shapes.
kB, MB and GB are powers of 1000. launch/memory/rules.py says what each optimizer keeps. Activations and the hosts' own
buffers are not counted. Autocast and FSDP2's mixed precision keep float32 weights too: they cast copies. --largest
searches ViTs from S to 22B, whole or with fewer layers, under FSDP2.
"""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory.models import SIZES, VITS, parameter_count, shapes_of, title
from memory.rules import HOSTS, OPTIMIZERS, Footprint, Layout, footprint
from plots import format_bytes, make_folder, number_table, write_json
from rich.console import Console
from rich.table import Table

REPORTED = (
    "vit-small", "vit-base", "vit-large", "vit-huge", "vit-giant", "swin-tiny", "llama-1b",
)  # fmt: skip
GB = 10**9

NOTES = """\
Weights, gradients: on every rank. States: on the fullest rank; each Shampoo has AdamW as its base. Muon: for 2-D
weights of hidden layers, with AdamW for the others. "packed" stores triangles of symmetric matrices.
Not counted: activations, gathered parameters, buckets. memory/rules.py has the rules."""

Footprints = dict[str, list[Footprint]]  # by model


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    make_folder(flags.output_dir)
    console = Console(width=150)
    if flags.largest:
        write_json(flags.output_dir / "largest.json", report_largest(flags, console))
    else:
        report(flags, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(SIZES), default=list(REPORTED), metavar="NAME",
        help=f"of {', '.join(SIZES)} (default: {' '.join(REPORTED)})",
    )  # fmt: skip
    parser.add_argument(
        "--world_sizes", nargs="+", type=int, default=[1, 2, 8], metavar="N", help="numbers of ranks (default: 1 2 8)"
    )
    parser.add_argument(
        "--hosts", nargs="+", choices=HOSTS[1:], default=list(HOSTS[1:]), metavar="HOST",
        help=f"what shards on several ranks, of {', '.join(HOSTS[1:])} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, default=2, help="copies of the model under hsdp; other world sizes are left out (2)"
    )
    parser.add_argument(
        "--largest", nargs=2, type=float, action="append", metavar=("N_GPUS", "GB"),
        help="which ViT fits, instead of the report; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memory"), help="for JSON files (runs/memory)")
    flags = parser.parse_args(arguments)
    if min([*flags.world_sizes, flags.replicas]) < 1:
        parser.error("--world_sizes and --replicas take positive integers")
    for gpus, room in flags.largest or []:
        if gpus < 1 or gpus != int(gpus) or room <= 0:
            parser.error(f"--largest takes a number of GPUs and a positive number of GB, got {gpus:g} {room:g}")
    return flags


# -- report ------------------------------------------------------------------------------------------------------------


def report(flags: argparse.Namespace, console: Console) -> None:
    """Print tables as they are computed, then write memory.json."""
    found: Footprints = {}
    parameters: dict[str, int] = {}
    alone: dict[str, Footprint] = {}
    for name in flags.models:
        shapes = shapes_of(name)
        parameters[name] = parameter_count(shapes)
        alone[name] = footprint(shapes, Layout("none", 1))
        found[name] = [footprint(shapes, layout) for layout in layouts(flags.world_sizes, flags.hosts, flags.replicas)]
        console.print(model_table(f"{title(name)}, {parameters[name]:,} parameters", found[name]))
    console.print(summary_table(alone, parameters))
    console.print(NOTES)
    figures = {
        name: {"title": title(name), "parameters": parameters[name], "bytes": [asdict(one) for one in each]}
        for name, each in found.items()
    }
    write_json(flags.output_dir / "memory.json", figures)


def layouts(world_sizes: Iterable[int], hosts: Iterable[str], replicas: int) -> list[Layout]:
    """List the hosts at each world size. One rank has no host; HSDP needs a multiple of its replicas."""
    return [
        Layout(host, size, replicas if host == "hsdp" else None)
        for host in ("none", *hosts)
        for size in world_sizes
        if (host == "none") == (size == 1) and not (host == "hsdp" and size % replicas)
    ]


def model_table(caption: str, found: list[Footprint]) -> Table:
    """Make a table with a line for each host and world size."""
    table = number_table(f"{caption}: bytes on a rank", "host", ("ranks", "weights", "gradients", *OPTIMIZERS.values()))
    for one in found:
        counts = (one.weights, one.gradients, *one.states.values())
        table.add_row(str(one.layout), str(one.layout.world_size), *map(format_bytes, counts))
    return table


def summary_table(alone: dict[str, Footprint], parameters: dict[str, int]) -> Table:
    """Make a table of the bytes of state per parameter on one process."""
    caption = "one process: bytes of optimizer state per parameter"
    table = number_table(caption, "model", ("parameters", *OPTIMIZERS.values()))
    for name, one in alone.items():
        count = parameters[name]
        table.add_row(title(name), f"{count:,}", *(f"{held / count:.2f}" for held in one.states.values()))
    return table


# -- the largest that fits ---------------------------------------------------------------------------------------------


def report_largest(flags: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Print a table for each number of GPUs and their size."""
    answers = []
    for count, size in flags.largest:
        gpus, room = int(count), size * GB
        caption = f"the largest ViT on {gpus} GPU{'s' if gpus > 1 else ''} of {size:g} GB, FSDP2"
        table = number_table(caption, "optimizer", ("ViT", "layers", "parameters", "GB on a GPU"))
        for optimizer, label in OPTIMIZERS.items():
            found = largest(optimizer, gpus, room)
            answers.append({"gpus": gpus, "gb": size, "optimizer": optimizer, **found})
            cells = ["none", "", "", ""]
            if found:
                layers = f"{found['layers']} of {SIZES[found['model']]['num_hidden_layers']}"
                cells = [title(found["model"]), layers, f"{found['parameters']:,}", f"{found['bytes'] / GB:.2f}"]
            table.add_row(label, *cells)
        console.print(table)
    console.print("Float32 weights, gradients and optimizer states only: activations need room too.")
    return answers


def largest(optimizer: str, gpus: int, room: float) -> dict[str, Any]:
    """Find the largest ViT that needs at most ``room`` bytes on each of ``gpus`` GPUs; {} if none does."""
    best: dict[str, Any] = {}
    for name in reversed(VITS):
        if best and best["parameters"] >= parameter_count(shapes_of(name)):
            break

        def needed(layers: int, name: str = name) -> int:
            return footprint(shapes_of(name, layers), Layout("fsdp2", gpus), [optimizer]).total(optimizer)

        depth = SIZES[name]["num_hidden_layers"]
        layers = bisect.bisect_right(range(1, depth + 1), room, key=needed)
        count = parameter_count(shapes_of(name, layers)) if layers else 0
        if count > best.get("parameters", 0):
            best = {"model": name, "layers": layers, "parameters": count, "bytes": needed(layers)}
    return best


if __name__ == "__main__":
    main()
