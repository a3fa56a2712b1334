"""Memory of AdamW, 8-bit AdamW, Muon, 32-bit Shampoo and Shampoo4 on every rank, before anything is trained.

    python launch/memory_report.py                       tables and a picture: models x hosts x world sizes
    python launch/memory_report.py --largest 8 24        the largest ViT that fits on 8 GPUs of 24 GB, by optimizer

Figures are bytes of float32 weights, float32 gradients and optimizer states on the fullest rank, computed from shapes.
kB, MB and GB are powers of 1000. launch/memory/rules.py says what each optimizer keeps; activations and the hosts' own
buffers are not counted. Weights in float32 are also what stays under autocast and under FSDP2's mixed precision, which
cast copies. --largest searches ViTs from S to 22B and their variants with fewer layers, under FSDP2.
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
from plots import BLUE, LIGHT_GRAY, MIDDLE_GRAY, RED, format_bytes, picture, write_json
from rich.console import Console
from rich.table import Table

REPORTED = (
    "vit-small", "vit-base", "vit-large", "vit-huge", "vit-giant", "vit-22b", "swin-tiny", "llama-1b", "llama-8b",
)  # fmt: skip
PLOTTED = ("vit-base", "vit-large", "vit-22b")
GB = 10**9

NOTES = """\
weights, gradients: on every rank. States: on the fullest rank; each Shampoo has AdamW as its base.
8-bit AdamW: bitsandbytes' layout, each rank quantizing what it holds. Muon: for 2-D weights of hidden layers, AdamW
for all else. 32-bit Shampoo: L, R and their inverse roots for blocks of at most 1024, as squares or packed as
triangles; on several ranks it is assumed to be spread as this library spreads its blocks. ZeRO 1 and 2 keep the rank's
part of float32 weights twice. Not counted: activations, gathered parameters, buckets."""

Footprints = dict[str, list[Footprint]]  # by model


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    if flags.largest:
        write_json(flags.output_dir / "largest.json", report_largest(flags, console))
    else:
        report(flags, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--reserve_gb", type=float, default=0.0, help="GB of each GPU that --largest leaves free (0)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memory"), help="for JSON and PNG (runs/memory)")
    flags = parser.parse_args(arguments)
    if min([*flags.world_sizes, flags.replicas]) < 1:
        parser.error("--world_sizes and --replicas take positive integers")
    for gpus, room in flags.largest or []:
        if gpus < 1 or gpus != int(gpus) or room <= flags.reserve_gb:
            parser.error(f"--largest takes a number of GPUs and GB above --reserve_gb, got {gpus:g} {room:g}")
    return flags


# -- report ------------------------------------------------------------------------------------------------------------


def report(flags: argparse.Namespace, console: Console) -> None:
    """Print tables as they are computed, then write memory.json and memory.png."""
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
    plotted = [name for name in PLOTTED if name in found] or flags.models[: len(PLOTTED)]
    host = "fsdp2" if "fsdp2" in flags.hosts else flags.hosts[0]
    draw({name: found[name] for name in plotted}, parameters, host, flags.output_dir / "memory.png")


def layouts(world_sizes: Iterable[int], hosts: Iterable[str], replicas: int) -> list[Layout]:
    """List the hosts at each world size: none on one rank; HSDP where its copies have equally many ranks."""
    return [
        Layout(host, size, replicas if host == "hsdp" else None)
        for host in ("none", *hosts)
        for size in world_sizes
        if (host == "none") == (size == 1) and not (host == "hsdp" and size % replicas)
    ]


def model_table(caption: str, found: list[Footprint]) -> Table:
    """A line for each host and world size."""
    table = _table(f"{caption}: bytes on a rank", "host", ("ranks", "weights", "gradients", *OPTIMIZERS.values()))
    for one in found:
        counts = (one.weights, one.gradients, *one.states.values())
        table.add_row(str(one.layout), str(one.layout.world_size), *map(format_bytes, counts))
    return table


def summary_table(alone: dict[str, Footprint], parameters: dict[str, int]) -> Table:
    """Bytes of state for each parameter where nothing is sharded."""
    caption = "one process: bytes of optimizer state per parameter"
    table = _table(caption, "model", ("parameters", *OPTIMIZERS.values()))
    for name, one in alone.items():
        count = parameters[name]
        table.add_row(title(name), f"{count:,}", *(f"{held / count:.2f}" for held in one.states.values()))
    return table


def _table(caption: str, first: str, numbers: Iterable[str]) -> Table:
    table = Table(first, title=caption, title_justify="left")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def draw(found: Footprints, parameters: dict[str, int], host: str, path: Path) -> None:
    """Stacked bars of weights, gradients and state by optimizer: a row for each model, a column for each world size."""
    chosen = {name: [one for one in each if one.layout.host in ("none", host)] for name, each in found.items()}
    rows, columns = len(chosen), max(map(len, chosen.values()))
    size = (1.6 + 3.6 * columns, 0.8 + 2.4 * rows)
    with picture(path, rows, columns, size, sharey=True, squeeze=False) as (figure, grid):
        for row, (name, footprints) in zip(grid, chosen.items(), strict=True):
            for axes, one in zip(row, footprints, strict=True):
                _draw_bars(axes, one)
                ranks = one.layout.world_size
                axes.set_title(f"{title(name)}, {'one process' if ranks == 1 else f'{ranks} ranks'}")
            row[0].set_ylabel(f"{parameters[name] / 1e6:,.0f} M parameters")
        grid[0, 0].invert_yaxis()
        for axes in grid[-1]:
            axes.set_xlabel("GB on the fullest rank")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(f"Memory of training in float32, {host}, without activations")
    print(f"wrote {path}")


def _draw_bars(axes: Any, one: Footprint) -> None:
    names = [OPTIMIZERS[optimizer] for optimizer in one.states]
    states = [held / GB for held in one.states.values()]
    weights, gradients = one.weights / GB, one.gradients / GB
    colors = [RED if optimizer == "shampoo4" else BLUE for optimizer in one.states]
    axes.barh(names, weights, color=LIGHT_GRAY, label="weights")
    axes.barh(names, gradients, left=weights, color=MIDDLE_GRAY, label="gradients")
    axes.barh(names, states, left=weights + gradients, color=colors, label="optimizer state")
    for position, state in enumerate(states):
        total = weights + gradients + state
        axes.annotate(f"{total:.3g}", (total, position), xytext=(3, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)


# -- the largest that fits ---------------------------------------------------------------------------------------------


def report_largest(flags: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Print a table for each number of GPUs and their size."""
    answers = []
    for count, size in flags.largest:
        gpus, room = int(count), (size - flags.reserve_gb) * GB
        kept = f", {flags.reserve_gb:g} of them kept free" if flags.reserve_gb else ""
        caption = f"the largest ViT on {gpus} GPU{'s' if gpus > 1 else ''} of {size:g} GB{kept}, FSDP2"
        table = _table(caption, "optimizer", ("ViT", "layers", "parameters", "GB on a GPU"))
        for optimizer, label in OPTIMIZERS.items():
            found = largest(optimizer, gpus, room)
            answers.append({"gpus": gpus, "gb": size, "reserve_gb": flags.reserve_gb, "optimizer": optimizer, **found})
            cells = ["none", "", "", ""]
            if found:
                layers = f"{found['layers']} of {SIZES[found['model']]['num_hidden_layers']}"
                cells = [title(found["model"]), layers, f"{found['parameters']:,}", f"{found['bytes'] / GB:.2f}"]
            table.add_row(label, *cells)
        console.print(table)
    console.print("Float32 weights, gradients and optimizer states only: activations need room too (--reserve_gb).")
    return answers


def largest(optimizer: str, gpus: int, room: float) -> dict[str, Any]:
    """Find the ViT with most parameters that needs at most ``room`` bytes on each of ``gpus`` GPUs; {} if none does.

    Candidates are the published ViTs, whole or with fewer layers.
    """
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
