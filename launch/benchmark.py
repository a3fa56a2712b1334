"""Step times, state bytes and transient memory of Shampoo4 and of other optimizers.

    python launch/benchmark.py modes                            each mode of ours, and other optimizers, in one process
    python launch/benchmark.py modes --num_hidden_layers 6      the larger model
    python launch/benchmark.py ranks --ranks 2 --host fsdp2     processes: step times, bytes sent, the exchange's share
    torchrun --nproc_per_node 8 launch/benchmark.py ranks       the same on processes that torchrun starts, on any nodes
    python launch/benchmark.py growth                           step times and states as parameters or blocks grow

Each writes a table, a JSON file and, but for ranks, a picture to --output_dir.

modes: the model is a vision transformer on 32 x 32 images in patches of 4. Its gradients for a few batches of random
images are computed once and replayed, so that only optimizers are timed. All of them get the same parameters and take
turns at each step, each on its own copy, so that whatever else loads the machine slows all alike. "CPU" is processor
time, "wall" elapsed time. A refresh is a step in which statistics and roots, or an eigenbasis, are due.

State: all tensors that an optimizer keeps, beside parameters and gradients. Transient: the most that a step has
allocated at any moment beyond its start; median and largest of one interval. The floor of an ordinary step of ours is
what cannot be avoided while roots are applied as matrices: the products L^(-1/4) G R^(-1/4) of all blocks in float32,
measured alone in the same run, and the step of torch's AdamW. An ordinary step of ours is one at which neither
statistics nor roots are due; of the staggered mode, where some are due at every step, it is every step.

| name | settings, where they are not the defaults of its package |
|---|---|
| adamw; muon | torch's; Muon for 2-D parameters and AdamW for the others |
| soap | pytorch_optimizer's, precondition_frequency = interval; sides up to 10,000, 1-D parameters as Adam |
| shampoo | pytorch_optimizer's, preconditioning_compute_steps = interval; no blocks, 1-D parameters too |
| scalable-shampoo | pytorch_optimizer's, preconditioning_compute_steps = interval; blocks of 512 |
| heavyball-soap | heavyball.SOAP, precondition_frequency = interval; sides up to 2048, dimensions merged |
| meta-shampoo | blocks of 1024, precondition_frequency = interval, Adam grafting, betas (0.9, 0.999) |
| bitsandbytes-adamw8bit; torchao-adamw8bit, -adamw4bit | fewer than 4096 elements stay in float32 |
| shampoo4, -32bit, -naive | statistics_interval = root_interval = interval; bits=32; quantize="preconditioner" |
| shampoo4-staggered, -implicit | with refresh="staggered", root="implicit" |
| shampoo4-compact, -compiled | with preset="compact"; compile=True |

Other preconditioners than ours absorb statistics at every step. Muon multiplies in bfloat16, which takes seconds on a
CPU that has no instructions for it. heavyball, torchao and shampoo4-compiled use torch.compile; on a CPU heavyball runs
eagerly unless --compile_all is given, since compiling takes it many minutes. The column "graph" tells. A peer that is
not installed is named with the reason and the command that installs it; one that raises, with its error.

ranks: AdamW and the modes of Shampoo4 train a copy of the same model each, in turns. A step takes as long as on its
slowest rank. What its parts take comes from torch's profiler in an interval of further steps, by the labels that the
library sets: gather (gradients to the owners of blocks), statistics, roots, precondition, graft, send_back (directions
to the holders) and base. The exchange is gather and send_back: packing, waiting and unpacking, and so also waiting for
a rank that computes longer; what travels while something is computed costs nothing. --trace keeps the profiles, for
chrome://tracing or Perfetto. On accelerators the parts are the host's times.

growth: stacks of matrices like a ViT's, random gradients, a refresh in every other step. GFLOP/s is what the products
of all blocks (launch/bench/blocks.py counts them) take of a step's time: constant where nothing else counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler reports each start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from bench.blocks import blocks_of
from bench.growth import draw_growth, growth_table, measure_growth
from bench.measure import Row, gradients_of_a_vit, measure, threads
from bench.optimizers import CHOICES, HEADS, OURS, PRODUCTS, is_ordinary
from bench.ranks import PROFILED, Job, measure_ranks
from plots import BLUE, RED, picture, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table

CONSOLE_WIDTH = 150


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    with threads(flags.threads):
        flags.run(flags, Console(width=CONSOLE_WIDTH))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(run=run)
        made.add_argument("--threads", type=int, default=1, help="of torch's CPU operations (1)")
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes (cpu)")
        made.add_argument("--output_dir", type=Path, default=Path(f"runs/{name}"), help=f"for files (runs/{name})")
        return made

    modes = command("modes", compare_modes, "Shampoo4's modes and other optimizers in one process.")
    ranks = command("ranks", compare_ranks, "AdamW and Shampoo4's modes on several processes.")
    for each, names in ((modes, tuple(CHOICES)), (ranks, ("adamw", *OURS))):
        each.add_argument("--hidden_size", type=int, default=384, help=f"of the ViT, a multiple of {HEADS} (384)")
        each.add_argument("--num_hidden_layers", type=int, default=2, help="of the ViT (2)")
        each.add_argument("--steps", type=int, default=30, help="timed steps of each optimizer (30)")
        each.add_argument("--interval", type=int, default=10, help="steps from one refresh to the next (10)")
        each.add_argument(
            "--only", nargs="+", choices=names, default=list(names), metavar="NAME",
            help=f"some of {', '.join(names)} (all); adamw is always among them",
        )  # fmt: skip
        compiling = each.add_mutually_exclusive_group()
        compiling.add_argument("--eager", action="store_true", help="compile nothing (some, see above)")
        if each is modes:
            compiling.add_argument("--compile_all", action="store_true", help="compile whatever can be (some)")
    ranks.add_argument("--ranks", type=int, default=2, help="processes, unless torchrun has started them (2)")
    ranks.add_argument("--host", choices=("ddp", "fsdp2", "hsdp"), default="ddp", help="what wraps the model (ddp)")
    ranks.add_argument("--trace", type=Path, metavar="DIR", help="for Chrome traces of every optimizer and rank (none)")

    growth = command("growth", compare_sizes, "Step times and states of Shampoo4 as parameters or blocks grow.")
    growth.set_defaults(eager=True, compile_all=False, interval=2)
    sizes = [1e6, 3e6, 1e7, 3e7]
    growth.add_argument("--parameters", type=float, nargs="+", default=sizes, help="how many (1e6 3e6 1e7 3e7)")
    growth.add_argument("--block_sizes", type=int, nargs="+", default=[1024], help="max_preconditioner_dim (1024)")
    growth.add_argument("--steps", type=int, default=6, help="timed steps, each second one a refresh (6)")

    flags = parser.parse_args(arguments)
    for name in ("num_hidden_layers", "steps", "interval", "threads", "ranks", "parameters", "block_sizes"):
        values = getattr(flags, name, 1)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} must be at least 1, got {values}")
    if flags.command == "growth" and flags.steps < 2:
        parser.error(f"--steps must be at least 2, got {flags.steps}")
    if getattr(flags, "hidden_size", HEADS) < HEADS or getattr(flags, "hidden_size", 0) % HEADS:
        parser.error(f"--hidden_size takes multiples of {HEADS}, got {flags.hidden_size}")
    flags.device = torch.device(flags.device)
    return flags


def setting(flags: argparse.Namespace) -> dict[str, Any]:
    """What every JSON file tells of the run."""
    return {
        **{name: value for name, value in vars(flags).items() if isinstance(value, (int, str)) and value is not True},
        "device": torch.cuda.get_device_name(flags.device) if flags.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


# -- modes -------------------------------------------------------------------------------------------------------------


def compare_modes(flags: argparse.Namespace, console: Console) -> None:
    """Measure all optimizers that were asked for, print the table, write the files."""
    about = setting(flags)
    names = [name for name in CHOICES if name == "adamw" or name in flags.only]
    absent = {name: reason for name in names if (reason := CHOICES[name].why_missing())}
    replayed = gradients_of_a_vit(flags)
    choices = {"products": PRODUCTS, **{name: CHOICES[name] for name in names if name not in absent}}
    found = {row["name"]: row for row in measure(choices, replayed, flags)}
    for name, reason in absent.items():
        choice = CHOICES[name]
        found[name] = {"name": name, "label": choice.label, "missing": reason, "install": choice.install}
    rows = [found[name] for name in ("products", *names)]
    clock = "cpu_ms" if flags.device.type == "cpu" else "wall_ms"
    about |= {
        "parameters": sum(gradient.numel() for gradient in replayed[0]),
        "blocks": blocks_of(gradient.shape for gradient in replayed[0]).total(),
        "clock": clock,
        "floor_ms": add_floors(rows, clock, flags.interval),
    }
    console.print(modes_table(rows, about))
    tell(rows, about, console)
    write_json(flags.output_dir / "benchmark.json", {**about, "optimizers": rows})
    draw(rows, about, flags.output_dir / "benchmark.png")
    print(f"wrote {flags.output_dir / 'benchmark.png'}")


def add_floors(rows: list[Row], clock: str, interval: int) -> float:
    """Give each row of ours the median of its ordinary steps and that over the floor; milliseconds of the floor."""
    floor: float = sum(row[clock]["median"] for row in rows if row["name"] in ("products", "adamw"))
    for row in rows:
        if row["name"] in OURS:
            taken = [ms for step, ms in row["steps"][clock].items() if is_ordinary(row["name"], step, interval)]
            if taken:
                row["ordinary_ms"] = statistics.median(taken)
                row["over_floor"] = row["ordinary_ms"] / floor
    return floor


def _empty_table(title: str, name_width: int | None, columns: Sequence[str]) -> Table:
    """With a column of names, at least so many characters wide, and columns of numbers."""
    found = Table(title=title, title_justify="left")
    found.add_column("optimizer", min_width=name_width)
    for column in columns:
        found.add_column(column, justify="right")
    return found


def modes_table(rows: list[Row], about: dict[str, Any]) -> Table:
    """A line for each optimizer; those without numbers say why."""
    title = (
        f"ViT, hidden {about['hidden_size']}, {about['num_hidden_layers']} layers, {about['parameters']:,} "
        f"parameters; refresh every {about['interval']} steps, {about['steps']} steps; {about['device']}, "
        f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}, load before {about['load_before']:.1f}"
    )
    found = _empty_table(title, 40, (
        "graph", "CPU ms\nmedian", "\nworst", "wall ms\nmedian", "\nworst", "worst /\nmedian", "state\nB/param",
        "transient\nMB", "refresh\nMB", "ordinary\n/ floor",
    ))  # fmt: skip
    for row in rows:
        if "cpu_ms" not in row:
            reason = row.get("error") or row["missing"]
            found.add_row(f"{row['label']}: [red]{escape(reason)}[/red]")
            continue
        times = [f"{row[which][kind]:.2f}" for which in ("cpu_ms", "wall_ms") for kind in ("median", "worst")]
        ratio = row[about["clock"]]["worst"] / row[about["clock"]]["median"]
        kept = f"{row['state_bytes_per_parameter']:.2f}" if row["name"] != "products" else ""
        transient = [f"{size / 1e6:.2f}" for size in row["transient_bytes"].values()]
        over = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        found.add_row(row["label"], row["graph"], *times, f"{ratio:.1f}", kept, *transient, over)
    return found


def tell(rows: list[Row], about: dict[str, Any], console: Console) -> None:
    """What the table has no column for."""
    unit = "CPU" if about["clock"] == "cpu_ms" else "elapsed"
    of_what = f"the products of {about['blocks']} blocks, and AdamW"
    console.print(f"Floor of an ordinary step of ours, {of_what}: {about['floor_ms']:.2f} {unit} ms.")
    if about["steps"] < about["interval"]:
        console.print("[red]These steps are less than an interval: no worst step holds a refresh.[/red]")
    for row in rows:
        if "missing" in row:
            console.print(f"Missing: {row['name']}. {escape(row['missing'])}. {escape(row['install'])}", soft_wrap=True)


def draw(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """State bytes against the median step, a whisker to the worst; names in a column at the right."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in rows if "cpu_ms" in row and row["name"] != "products"]
    with picture(path, size=(11, 6.5)) as (_, axes):
        axes.set(xscale="log", yscale="log")
        for row in shown:
            times, kept, color = row[about["clock"]], row["state_bytes_per_parameter"], _color(row)
            whisker = [[0.0], [times["worst"] - times["median"]]]
            axes.errorbar(times["median"], kept, xerr=whisker, fmt="o", color=color, capsize=3, elinewidth=1)
        axes.margins(0.08)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{'CPU' if about['clock'] == 'cpu_ms' else 'elapsed'} ms of a step: median, and to the worst")
        axes.set_ylabel("bytes of optimizer state per parameter")
        axes.set_title(f"{about['parameters'] / 1e6:.2f} M parameters, refresh every {about['interval']} steps")
        axes.autoscale_view()
        _name_points(axes, shown, about["clock"])


def _color(row: Row) -> str:
    return RED if row["name"] in OURS else BLUE


def _name_points(axes: Any, rows: list[Row], clock: str) -> None:
    """Names beside the axes at the heights of their points, or near them; lines lead from the whiskers' ends."""
    ends = [(row[clock]["worst"], row["state_bytes_per_parameter"]) for row in rows]
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted(zip(to_axes.transform(ends).tolist(), ends, rows, strict=True), key=lambda each: each[0][::-1])
    heights = spread([height for (_, height), _, _ in placed], gap=0.042)
    for height, (_, end, row) in zip(heights, placed, strict=True):
        line = {"arrowstyle": "-", "color": "#b9c2cb", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
        axes.annotate(
            row["label"], end, (1.03, height), xycoords="data", textcoords="axes fraction", va="center",
            color=_color(row), arrowprops=line,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising ``heights``, moved up where they are closer than ``gap``, and down again where they would exceed 1.

    >>> spread([0.2, 0.2, 0.9, 1.0], gap=0.25)
    [0.2, 0.45, 0.75, 1.0]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


# -- ranks -------------------------------------------------------------------------------------------------------------


def compare_ranks(flags: argparse.Namespace, console: Console) -> None:
    """Train with AdamW and ours on ranks, print the tables, write ranks.json."""
    about = setting(flags)
    names = tuple(name for name in ("adamw", *OURS) if name == "adamw" or name in flags.only)
    if flags.trace:
        flags.trace.mkdir(parents=True, exist_ok=True)
    job = Job(
        names, flags.hidden_size, flags.num_hidden_layers, flags.host, flags.device.type, flags.interval, flags.steps,
        flags.eager, flags.trace,
    )  # fmt: skip
    rows = measure_ranks(job, flags.ranks)
    if int(os.environ.get("RANK", 0)):
        return
    about["ranks"] = len(rows[0]["state_bytes"])
    console.print(rank_table(rows, about))
    console.print(parts_table(rows))
    write_json(flags.output_dir / "ranks.json", {**about, "optimizers": rows})


def rank_table(rows: list[Row], about: dict[str, Any]) -> Table:
    """A line for each optimizer."""
    title = (
        f"ViT, hidden {about['hidden_size']}, {about['num_hidden_layers']} layers; {about['host']} on {about['ranks']} "
        f"ranks; refresh every {about['interval']} steps, {about['steps']} steps; "
        f"load before {about['load_before']:.1f}"
    )
    found = _empty_table(title, None, (
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
    """Milliseconds of the parts of our ordinary steps, and of those with a refresh, on the slowest rank."""
    found = _empty_table("milliseconds of profiled steps, on the slowest rank", None, PROFILED)
    for row in rows:
        for kind, spent in row["parts_ms"].items():
            if row["name"] in OURS:
                found.add_row(f"{row['label']}, {kind}", *(f"{spent[part]:.1f}" for part in PROFILED))
    return found


# -- growth ------------------------------------------------------------------------------------------------------------


def compare_sizes(flags: argparse.Namespace, console: Console) -> None:
    """Measure every size, print the table, write growth.json and growth.png."""
    about = setting(flags)
    rows = measure_growth(flags)
    clock = "processor" if flags.device.type == "cpu" else "elapsed"
    title = f"Shampoo4 on stacks like a ViT's; {about['device']}, {clock} time, load before {about['load_before']:.1f}"
    console.print(growth_table(rows, title))
    write_json(flags.output_dir / "growth.json", {**about, "sizes": rows})
    draw_growth(rows, flags.output_dir / "growth.png")
    print(f"wrote {flags.output_dir / 'growth.png'}")


if __name__ == "__main__":
    main()
