"""How the cost of Shampoo4's steps grows: with the parameters, with the ranks that share them, and with the blocks.

    python launch/bench_growth.py                         everything: three tables, runs/growth/growth.json and .png
    python launch/bench_growth.py --only parameters --parameters 1e6 3e6 1e7
    python launch/bench_growth.py --only ranks --world_sizes 1 2 4

Parameters: stacks of matrices like a ViT's, with torch's AdamW beside it on the same gradients. Ranks: processes with
one thread each, over gloo, that all hold whole parameters, as under DDP. Blocks: the same square matrices, cut into
blocks of at most so many rows and columns. Random gradients are replayed; statistics and roots are due in every other
step, a refresh, and in none of the others, the ordinary ones. Times are medians over the rounds: processor time of the
process, so that whatever else the machine does counts little, or elapsed time on an accelerator. On ranks they are the
busiest one's; elapsed time is that of the slowest, from a common start, and tells something on an idle machine only.

Beside each time stands what launch/growth_model.py, which has the formulae, predicts from the shapes:

    ordinary step  =  c x its flops          refresh step  =  ordinary step + d x the flops that it has besides

with two constants, in seconds per flop, fitted once: what the first table's steps took in all, over their flops, so
that its largest sizes decide. (Beside an accelerator, ranks have constants of their own.) A ratio of measured to
predicted that rises towards small sizes shows what no product accounts for, decoding, norms, copies and the base
optimizer's step, and that small products run at a lower rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from growth_model import Shapes, busiest, owned_blocks, squares, stack, stack_shapes
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.spawn import start_processes

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.memory import format_bytes
from sharded_shampoo4.options import PreconditionerOptions

KINDS = ("ordinary", "refresh", "adamw")
TABLES = ("parameters", "ranks", "blocks")
INTERVAL = 2  # steps from one refresh to the next
WARM_UP = INTERVAL + 1  # steps: roots are there, and each kind has come once
GRADIENTS = 2  # sets that are replayed

Row = dict[str, Any]


class Times(NamedTuple):
    """Seconds of one step."""

    elapsed: float
    processor: float


class Measured(NamedTuple):
    """The steps of each kind on a rank, and the bytes that it sent to others in each ordinary one."""

    steps: dict[str, list[Times]]
    sent: list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    torch.set_num_threads(flags.threads)
    found: dict[str, list[Row]] = {}
    for name, measure in (("parameters", by_parameters), ("ranks", by_ranks), ("blocks", by_blocks)):
        if name in flags.only:
            console.print(f"measuring: {name}", highlight=False)
            found[name] = measure(flags)
    constants = fit(next(iter(found.values())))
    for name, rows in found.items():
        apart = name == "ranks" and flags.device.type != "cpu"  # they are processes on the CPU
        for row in rows:
            predict(row, fit(rows) if apart else constants)
        console.print(table(name, rows, flags))
    console.print(
        f"fitted to the first table: {1e12 * constants['ordinary']:.2f} ps per float32 flop of an ordinary step, "
        f"{1e12 * constants['refresh']:.2f} ps per float64 flop of a refresh",
        highlight=False,
    )
    setting = {"threads": flags.threads, "device": str(flags.device), "torch": torch.__version__}
    report = {**setting, "seconds_per_flop": constants, **found}
    (flags.output_dir / "growth.json").write_text(json.dumps(report, indent=1))
    plot(found, flags.output_dir / "growth.png")
    console.print(f"written: {flags.output_dir / 'growth.json'} and growth.png", highlight=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="which tables (all)")
    sizes = [1e6, 3e6, 1e7, 3e7, 1e8]
    parser.add_argument("--parameters", type=float, nargs="+", default=sizes, help="how many (1e6 3e6 1e7 3e7 1e8)")
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (1 2 4)")
    parser.add_argument("--matrices", type=int, default=8, help="square ones that the ranks share (8)")
    parser.add_argument("--order", type=int, default=768, help="rows and columns of each (768)")
    blocks = [128, 256, 512, 1024, 2048]
    parser.add_argument(
        "--block_sizes", type=int, nargs="+", default=blocks, help="max_preconditioner_dim (128 256 512 1024 2048)"
    )
    parser.add_argument("--block_matrices", type=int, default=1, help="square ones that are cut into blocks (1)")
    parser.add_argument("--block_order", type=int, default=2048, help="rows and columns of each (2048)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind, after one for warming up (3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch's CPU operations, but on ranks (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all but the ranks (cpu)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/growth"), help="for JSON and PNG (runs/growth)")
    flags = parser.parse_args(arguments)
    counts = (flags.matrices, flags.order, flags.block_matrices, flags.block_order, flags.rounds, flags.threads)
    if min(*counts, *flags.world_sizes, *flags.block_sizes, *flags.parameters) < 1:
        parser.error("all sizes and numbers must be at least 1")
    flags.device = torch.device(flags.device)
    return flags


# -- measuring ---------------------------------------------------------------------------------------------------------


def by_parameters(flags: argparse.Namespace) -> list[Row]:
    options = PreconditionerOptions()
    rows = []
    for wanted in flags.parameters:
        hidden, layers = stack(wanted)
        shapes = stack_shapes(hidden, layers)
        row = {"hidden_size": hidden, "layers": layers, **expected(shapes, options)}
        rows.append({**row, "x": row["parameters"], **median([alone(shapes, options, flags)], flags.device)})
    return rows


def by_blocks(flags: argparse.Namespace) -> list[Row]:
    shapes = squares(flags.block_matrices, flags.block_order)
    rows = []
    for size in flags.block_sizes:
        options = PreconditionerOptions(max_preconditioner_dim=size)
        row = {"x": size, **expected(shapes, options)}
        rows.append({**row, **median([alone(shapes, options, flags)], flags.device)})
    return rows


def by_ranks(flags: argparse.Namespace) -> list[Row]:
    shapes, options = squares(flags.matrices, flags.order), PreconditionerOptions()
    multiprocessing.set_forkserver_preload(["sharded_shampoo4"])
    rows = []
    for world_size in flags.world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world_size, shapes, options, flags.rounds, folder)
            start_processes(_on_a_rank, arguments, nprocs=world_size, start_method="forkserver")
            ranks = [_read(Path(folder, f"{rank}.json")) for rank in range(world_size)]
        row = {"x": world_size, **expected(shapes, options, world_size), "sent": max(max(r.sent) for r in ranks)}
        rows.append({**row, **median(ranks, torch.device("cpu"))})
    return rows


def _on_a_rank(
    rank: int, world_size: int, shapes: Shapes, options: PreconditionerOptions, rounds: int, folder: str
) -> None:
    """Take steps, and leave what was measured in ``folder``."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    measured = take_steps(shapes, options, rounds, torch.device("cpu"), dist.barrier)
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def _read(path: Path) -> Measured:
    steps, sent = json.loads(path.read_text())
    return Measured({kind: [Times(*times) for times in taken] for kind, taken in steps.items()}, sent)


def alone(shapes: Shapes, options: PreconditionerOptions, flags: argparse.Namespace) -> Measured:
    """Steps in this process."""
    measured = take_steps(shapes, options, flags.rounds, flags.device, lambda: None)
    gc.collect()
    return measured


def take_steps(
    shapes: Shapes, options: PreconditionerOptions, rounds: int, device: torch.device, meet: Callable[[], object]
) -> Measured:
    """Steps of Shampoo4, ordinary and with a refresh in turn, and AdamW's; ``meet`` is called before each."""
    generator = torch.Generator(device).manual_seed(0)
    replayed = [
        [torch.randn(*shape, generator=generator, device=device) for shape in shapes.values()] for _ in range(GRADIENTS)
    ]
    ours, theirs = ([nn.Parameter(torch.zeros_like(like)) for like in replayed[0]] for _ in range(2))
    limit = options.max_preconditioner_dim
    shampoo = Shampoo4(ours, statistics_interval=INTERVAL, root_interval=INTERVAL, max_preconditioner_dim=limit)
    adamw = torch.optim.AdamW(theirs, lr=1e-3)
    measured = Measured({kind: [] for kind in KINDS}, [])
    for step in range(1, WARM_UP + INTERVAL * rounds + 1):
        for own, other, gradient in zip(ours, theirs, replayed[step % GRADIENTS], strict=True):
            own.grad, other.grad = gradient.clone(), gradient  # ours overwrites it
        before = shampoo.traffic_bytes()
        times = [timed(optimizer.step, device, meet) for optimizer in (shampoo, adamw)]
        if step > WARM_UP:
            ordinary = step % INTERVAL != 0
            measured.steps["ordinary" if ordinary else "refresh"].append(times[0])
            measured.steps["adamw"].append(times[1])
            if ordinary:
                measured.sent.append(shampoo.traffic_bytes() - before)
    return measured


def timed(step: Callable[[], object], device: torch.device, meet: Callable[[], object]) -> Times:
    """The times of one step, with all that the accelerator does in it."""
    meet()
    finish(device)
    elapsed, processor = time.perf_counter(), time.process_time()
    step()
    finish(device)
    return Times(time.perf_counter() - elapsed, time.process_time() - processor)


def finish(device: torch.device) -> None:
    """Wait for what the accelerator still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(ranks: Sequence[Measured], device: torch.device) -> dict[str, Any]:
    """Seconds of each kind of step, the busiest rank's; and elapsed ones, the slowest rank's."""
    busy: dict[str, float] = {}
    elapsed: dict[str, float] = {}
    for kind in KINDS:
        steps = list(zip(*(rank.steps[kind] for rank in ranks), strict=True))
        elapsed[kind] = statistics.median(max(rank.elapsed for rank in step) for step in steps)
        busy[kind] = statistics.median(max(rank.processor for rank in step) for step in steps)
    seconds = elapsed if device.type == "cuda" else busy
    taken = [rank.steps for rank in ranks]
    return {"seconds": seconds, "elapsed": elapsed, "load": os.getloadavg()[0], "steps": taken}


# -- the model ---------------------------------------------------------------------------------------------------------


def expected(shapes: Shapes, options: PreconditionerOptions, world_size: int = 1) -> Row:
    """What the shapes alone tell: counts, and the work and the bytes of the rank that has most."""
    work = busiest(shapes, world_size, options)
    limit = options.max_preconditioner_dim
    traffic = estimate_memory(shapes, world_size, host="ddp", max_preconditioner_dim=limit).traffic
    return {
        "parameters": sum(rows * columns for rows, columns in shapes.values()),
        "block_count": sum(map(len, owned_blocks(shapes, world_size, options))),
        "flops": {"ordinary": work.ordinary, "refresh": work.refresh, "factorisations": work.factorisations},
        "decoded_bytes": work.decoded,
        "traffic_bytes": max(traffic),
    }


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds per flop of ordinary steps, and of what refresh steps have besides: sums over ``rows``."""
    ordinary, refresh = (sum(row["seconds"][kind] for row in rows) for kind in ("ordinary", "refresh"))
    flops = {kind: sum(row["flops"][kind] for row in rows) for kind in ("ordinary", "refresh")}
    return {"ordinary": ordinary / flops["ordinary"], "refresh": max(refresh - ordinary, 0.0) / flops["refresh"]}


def predict(row: Row, constants: dict[str, float]) -> None:
    """Add to ``row`` the predicted seconds, and measured over predicted."""
    ordinary = constants["ordinary"] * row["flops"]["ordinary"]
    row["predicted"] = {"ordinary": ordinary, "refresh": ordinary + constants["refresh"] * row["flops"]["refresh"]}
    row["ratio"] = {kind: row["seconds"][kind] / seconds for kind, seconds in row["predicted"].items()}


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(name: str, rows: Sequence[Row], flags: argparse.Namespace) -> Table:
    """Measured and predicted, a row for each size."""
    shapes = {
        "parameters": "Against parameters: stacks like a ViT's",
        "ranks": f"Against ranks: {flags.matrices} matrices {flags.order} x {flags.order}, the busiest rank",
        "blocks": f"Against the order of blocks: {flags.block_matrices} of {flags.block_order} x {flags.block_order}",
    }
    on_ranks = name == "ranks"
    drawn = Table(title=f"{shapes[name]}; {_kind_of_time(name, flags)} in milliseconds")
    columns = [{"parameters": "parameters", "ranks": "ranks", "blocks": "order"}[name], "blocks", "decoded"]
    for kind in ("ordinary", "refresh"):
        columns += [f"{kind}\nGFLOP", f"{kind}\nms", f"{kind}\n/ model"]
    columns += ["AdamW\nms", *(("ordinary\nelapsed", "refresh\nelapsed", "sent", "estimated") if on_ranks else ())]
    for column in columns:
        drawn.add_column(column, justify="right")
    for row in rows:
        flops, ratio = row["flops"], row["ratio"]
        milliseconds = {kind: f"{1e3 * seconds:.1f}" for kind, seconds in row["seconds"].items()}
        elapsed = {kind: f"{1e3 * seconds:.1f}" for kind, seconds in row["elapsed"].items()}
        size = f"{row['x'] / 1e6:.2f} M" if name == "parameters" else str(row["x"])
        cells = [size, str(row["block_count"]), format_bytes(row["decoded_bytes"])]
        for kind in ("ordinary", "refresh"):
            cells += [f"{flops[kind] / 1e9:.3g}", milliseconds[kind], f"{ratio[kind]:.2f}"]
        cells.append(milliseconds["adamw"])
        if on_ranks:
            cells += [elapsed["ordinary"], elapsed["refresh"]]
            cells += [format_bytes(row["sent"]), format_bytes(row["traffic_bytes"])]
        drawn.add_row(*cells)
    return drawn


def _kind_of_time(name: str, flags: argparse.Namespace) -> str:
    return "elapsed time" if flags.device.type == "cuda" and name != "ranks" else "processor time"


def plot(found: dict[str, list[Row]], path: Path) -> None:
    """Three panels, log-log: measured as points, predicted as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TABLES), figsize=(13, 4), layout="constrained")
    labels = {"parameters": "parameters", "ranks": "ranks", "blocks": "rows and columns of a block"}
    for panel, name in zip(panels, TABLES, strict=True):
        rows = sorted(found.get(name, []), key=lambda row: row["x"])
        panel.set(xlabel=labels[name], xscale="log", yscale="log")
        for kind, color in (("refresh", "#c8452d"), ("ordinary", "#2a6fbb"), ("adamw", "#777777")):
            sizes = [row["x"] for row in rows]
            panel.plot(sizes, [row["seconds"][kind] for row in rows], "o", color=color, label=kind)
            if kind != "adamw":
                panel.plot(sizes, [row["predicted"][kind] for row in rows], "-", color=color, linewidth=1)
        if rows and name != "parameters":
            panel.set_xticks([row["x"] for row in rows], [str(row["x"]) for row in rows])
            panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of a step; lines: predicted")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
