"""Memory of AdamW, 8-bit AdamW, Muon, 32-bit Shampoo and Shampoo4 on every rank, before anything is trained.

python launch/memory_report.py                       tables and a picture: models x hosts x world sizes
python launch/memory_report.py --measure             allocate it on 1, 2 and 4 processes: estimate = measured?
python launch/memory_report.py --largest 8 24        the largest ViT that fits on 8 GPUs of 24 GB, by optimizer

Figures are bytes of float32 weights, float32 gradients and optimizer states on the fullest rank, computed from shapes
with the plan by which the library spreads its blocks. kB, MB and GB are powers of 1000. launch/memory_rules.py says
what each optimizer keeps; activations and the hosts' own buffers are not counted. Weights in float32 are also what
stays under autocast and under FSDP2's mixed precision, which cast copies.

--measure builds each model with random weights on as many gloo processes, takes one step, and compares every rank's
bytes with the estimate; it ends with status 1 where they differ. --largest searches ViTs from S to 22B under FSDP2, and
between two published ones the larger with fewer layers; above 22B, that one with more.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memory_largest import largest
from memory_models import SIZES, shapes_of, title
from memory_rules import HOSTS, OPTIMIZERS, Footprint, Layout, Planner
from plots import format_bytes
from rich.console import Console
from rich.table import Table

REPORTED = (
    "vit-small", "vit-base", "vit-large", "vit-huge", "vit-giant", "vit-22b", "swin-tiny", "llama-1b", "llama-8b",
)  # fmt: skip
PLOTTED = ("vit-base", "vit-large", "vit-22b")
GB = 10**9

NOTES = """\
weights, gradients: on every rank. States: on the fullest rank; each Shampoo has AdamW as its base.
8-bit AdamW: bitsandbytes' layout, each rank quantising what it holds. Muon: for 2-D weights of hidden layers, AdamW
for all else. 32-bit Shampoo: L, R and their inverse roots for blocks of at most 1024, as squares or packed as
triangles; on several ranks it is assumed to be spread as this library spreads its blocks. ZeRO 1 and 2 keep the rank's
part of float32 weights twice. Not counted: activations, gathered parameters, buckets."""

_COLORS = {"weights": "#b9c2cb", "gradients": "#8a96a3", "state": "#2a6fbb", "own": "#c8452d"}

Footprints = dict[str, list[Footprint]]  # by model


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    if flags.largest:
        write(flags.output_dir / "largest.json", answer_largest(flags, console))
    if flags.measure:
        try:
            compare_measured(flags, console)
        except MemoryError as error:
            raise SystemExit(str(error)) from None
    if not (flags.largest or flags.measure):
        report(flags, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults of what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(SIZES), metavar="NAME",
        help=f"of {', '.join(SIZES)}; default: {' '.join(REPORTED)}, or vit-small with --measure",
    )  # fmt: skip
    parser.add_argument("--world_sizes", nargs="+", type=int, metavar="N", help="default: 1 2 8 64; measured: 1 2 4")
    parser.add_argument(
        "--hosts", nargs="+", choices=HOSTS[1:], metavar="HOST",
        help=f"what shards on several ranks, of {', '.join(HOSTS[1:])}; default: all; measured: ddp fsdp2",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, default=2, help="copies of the model under hsdp (2); other world sizes are left out"
    )
    parser.add_argument("--measure", action="store_true", help="allocate and compare, instead of the report")
    parser.add_argument(
        "--largest", nargs=2, type=float, action="append", metavar=("N_GPUS", "GB"),
        help="which ViT fits, instead of the report; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--reserve_gb", type=float, default=0.0, help="GB of each GPU that --largest leaves free, for activations"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memory"), help="for JSON and PNG (runs/memory)")
    flags = parser.parse_args(arguments)
    if min([*(flags.world_sizes or [1]), flags.replicas]) < 1:
        parser.error("--world_sizes and --replicas take positive integers")
    for gpus, room in flags.largest or []:
        if gpus < 1 or gpus != int(gpus) or room <= flags.reserve_gb:
            parser.error(f"--largest takes a number of GPUs and GB above --reserve_gb, got {gpus:g} {room:g}")
    flags.models = flags.models or (["vit-small"] if flags.measure else list(REPORTED))
    flags.world_sizes = flags.world_sizes or ([1, 2, 4] if flags.measure else [1, 2, 8, 64])
    flags.hosts = flags.hosts or (["ddp", "fsdp2"] if flags.measure else list(HOSTS[1:]))
    return flags


def layouts(world_sizes: Iterable[int], hosts: Iterable[str], replicas: int) -> list[Layout]:
    """The hosts at each world size: none on one rank; HSDP where its copies have equally many ranks."""
    chosen = []
    for host in ("none", *hosts):
        for size in world_sizes:
            if (host == "none") == (size == 1) and not (host == "hsdp" and size % replicas):
                chosen.append(Layout(host, size, replicas if host == "hsdp" else None))
    return chosen


def write(path: Path, content: Any) -> None:
    """A JSON file, and where it is."""
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


# -- report ------------------------------------------------------------------------------------------------------------


def report(flags: argparse.Namespace, console: Console) -> None:
    """Tables as they are computed, then memory.json and memory.png."""
    found: Footprints = {}
    alone: dict[str, tuple[int, Footprint]] = {}
    for name in flags.models:
        planner = Planner(shapes_of(name))
        alone[name] = planner.parameters, planner.footprint(Layout("none", 1))
        wanted = layouts(flags.world_sizes, flags.hosts, flags.replicas)
        found[name] = [planner.footprint(layout) for layout in wanted]
        console.print(model_table(f"{title(name)}, {planner.parameters:,} parameters", found[name]))
    console.print(summary_table(alone))
    console.print(NOTES)
    parameters = {name: count for name, (count, _) in alone.items()}
    write(flags.output_dir / "memory.json", as_json(found, parameters))
    plotted = [name for name in PLOTTED if name in found] or flags.models[: len(PLOTTED)]
    host = "fsdp2" if "fsdp2" in flags.hosts else flags.hosts[0]
    draw({name: found[name] for name in plotted}, parameters, host, flags.output_dir / "memory.png")
    print(f"wrote {flags.output_dir / 'memory.png'}")


def model_table(caption: str, found: list[Footprint]) -> Table:
    """A line for each host and world size."""
    table = Table(title=f"{caption}: bytes on a rank", title_justify="left")
    table.add_column("host")
    for column in ("ranks", "weights", "gradients", *OPTIMIZERS.values()):
        table.add_column(column, justify="right")
    for footprint in found:
        layout = footprint.layout
        label = f"{layout.host}, {layout.replicas} copies" if layout.replicas else layout.host
        counts = (footprint.weights, footprint.gradients, *footprint.states.values())
        table.add_row(label, str(layout.world_size), *map(format_bytes, counts))
    return table


def summary_table(alone: dict[str, tuple[int, Footprint]]) -> Table:
    """Bytes of state for each parameter where nothing is sharded."""
    table = Table(title="one process: bytes of optimizer state per parameter", title_justify="left")
    table.add_column("model")
    for column in ("parameters", *OPTIMIZERS.values()):
        table.add_column(column, justify="right")
    for name, (count, footprint) in alone.items():
        table.add_row(title(name), f"{count:,}", *(f"{held / count:.2f}" for held in footprint.states.values()))
    return table


def as_json(found: Footprints, parameters: dict[str, int]) -> dict[str, Any]:
    """All figures, in bytes."""
    return {
        name: {
            "title": title(name),
            "parameters": parameters[name],
            "bytes": [
                {
                    "host": footprint.layout.host,
                    "world_size": footprint.layout.world_size,
                    "replicas": footprint.layout.replicas,
                    "weights": footprint.weights,
                    "gradients": footprint.gradients,
                    "states": footprint.states,
                    "totals": {optimizer: footprint.total(optimizer) for optimizer in footprint.states},
                }
                for footprint in footprints
            ],
        }
        for name, footprints in found.items()
    }


def draw(found: Footprints, parameters: dict[str, int], host: str, path: Path) -> None:
    """Stacked bars of weights, gradients and state by optimizer: a row for each model, a column for each world size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = {name: [one for one in each if one.layout.host in ("none", host)] for name, each in found.items()}
    columns = max(map(len, chosen.values()))
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            len(chosen), columns, figsize=(1.6 + 3.6 * columns, 0.8 + 2.4 * len(chosen)), layout="constrained",
            sharey=True, squeeze=False,
        )  # fmt: skip
        for row, (name, footprints) in zip(grid, chosen.items(), strict=True):
            for axes, footprint in zip(row, footprints, strict=True):
                _draw_bars(axes, footprint)
                ranks = footprint.layout.world_size
                axes.set_title(f"{title(name)}, {'one process' if ranks == 1 else f'{ranks} ranks'}")
            row[0].set_ylabel(f"{parameters[name] / 1e6:,.0f} M parameters")
        grid[0, 0].invert_yaxis()
        for axes in grid[-1]:
            axes.set_xlabel("GB on the fullest rank")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(f"Memory of training in float32, {host}, without activations", fontweight="bold")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw_bars(axes: Any, footprint: Footprint) -> None:
    names = [OPTIMIZERS[optimizer] for optimizer in footprint.states]
    states = [held / GB for held in footprint.states.values()]
    weights, gradients = footprint.weights / GB, footprint.gradients / GB
    colors = [_COLORS["own" if optimizer == "shampoo4" else "state"] for optimizer in footprint.states]
    axes.barh(names, weights, color=_COLORS["weights"], label="weights")
    axes.barh(names, gradients, left=weights, color=_COLORS["gradients"], label="gradients")
    axes.barh(names, states, left=weights + gradients, color=colors, label="optimizer state")
    for position, state in enumerate(states):
        total = weights + gradients + state
        axes.annotate(f"{total:.3g}", (total, position), xytext=(3, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)


# -- measure -----------------------------------------------------------------------------------------------------------


def compare_measured(flags: argparse.Namespace, console: Console) -> None:
    """Allocate every layout, and compare; SystemExit where a rank's bytes are not the estimated ones."""
    from memory_measure import Held, estimated, measured

    rows, wrong = [], []
    table = Table(title="bytes on each rank, measured (and estimated where it differs)", title_justify="left")
    for column in ("model", "host", "ranks", "rank", *Held._fields):
        table.add_column(column, justify="left" if column in ("model", "host") else "right")
    wanted = layouts(flags.world_sizes, flags.hosts, flags.replicas)
    for name, size in itertools.product(flags.models, sorted({layout.world_size for layout in wanted})):
        together = [layout for layout in wanted if layout.world_size == size]
        console.print(f"{title(name)} on {size}: {', '.join(layout.host for layout in together)} ...")
        for layout, held in zip(together, measured(name, together), strict=True):
            for rank, (should, is_) in enumerate(zip(estimated(name, layout), held, strict=True)):
                cells = [_compared(a, b) for a, b in zip(should, is_, strict=True)]
                table.add_row(title(name), layout.host, str(size), str(rank), *cells)
                where = {"model": name, "host": layout.host, "world_size": size, "rank": rank}
                rows.append({**where, "estimated": should._asdict(), "measured": is_._asdict()})
                if should != is_:
                    wrong.append(f"{name} under {layout.host}, rank {rank} of {size}: {should} != {is_}")
    console.print(table)
    write(flags.output_dir / "measured.json", rows)
    if wrong:
        raise SystemExit("estimated and measured bytes differ:\n" + "\n".join(wrong))
    console.print(f"estimate = measured on all {len(rows)} ranks")


def _compared(expected: int | None, held: int | None) -> str:
    if expected == held:
        return "-" if held is None else f"{held:,}"
    return f"[red]{held:,} ({expected:,})[/red]"


# -- largest -----------------------------------------------------------------------------------------------------------


def answer_largest(flags: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A table for each number of GPUs and their size."""
    answers = []
    for count, size in flags.largest:
        gpus, room = int(count), (size - flags.reserve_gb) * GB
        kept = f", {flags.reserve_gb:g} of them kept free" if flags.reserve_gb else ""
        plural = "s" if gpus > 1 else ""
        table = Table(title=f"the largest ViT on {gpus} GPU{plural} of {size:g} GB{kept}, FSDP2", title_justify="left")
        for column in ("optimizer", "largest", "parameters", "GB on a GPU", "largest published"):
            table.add_column(column, justify="right" if column in ("parameters", "GB on a GPU") else "left")
        for optimizer, label in OPTIMIZERS.items():
            answer = largest(optimizer, gpus, room)
            asked = {"gpus": gpus, "gb": size, "reserve_gb": flags.reserve_gb, "optimizer": optimizer}
            if answer is None:
                table.add_row(label, "none", "", "", "none")
                answers.append({**asked, "largest": None})
                continue
            published = title(answer.published) if answer.published else "none"
            table.add_row(label, str(answer), f"{answer.parameters:,}", f"{answer.total / GB:.2f}", published)
            answers.append({**asked, "largest": {**vars(answer), "text": str(answer)}})
        console.print(table)
    console.print("Float32 weights, gradients and optimizer states only: activations need room too (--reserve_gb).")
    return answers


if __name__ == "__main__":
    main()
