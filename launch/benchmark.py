"""Step times, state bytes and transient memory of Shampoo4 and of other optimizers.

    python launch/benchmark.py modes                            each mode of ours, and other optimizers, in one process
    python launch/benchmark.py modes --num_hidden_layers 6      the larger model
    torchrun --nproc_per_node 2 launch/benchmark.py ranks       processes: step times, bytes sent, exchange's share
    python launch/benchmark.py growth                           step times and states as parameters or blocks grow
    python launch/benchmark.py scale                            plans for up to 1,024 ranks, computed in one process
    python launch/benchmark.py shapes                           blocks and bytes of factors of large models, computed

Each writes a table and a JSON file to --output_dir; modes and growth also draw a picture. launch/RESULTS.md explains
the columns and lists the settings of each optimizer.

modes: the gradients of a vision transformer on random images are computed once and replayed. The optimizers take turns
at each step, each on its own copy of the parameters, so that a busy machine slows all of them alike. Some use
torch.compile, but not heavyball on a CPU, where it would compile for many minutes.

ranks: each optimizer trains its own copy of the same model. The time of a step is that of its slowest rank. The times
of its parts come from torch's profiler, in one more interval of steps. On accelerators these are times of the host.

growth: stacks of matrices like a ViT's, random gradients, a refresh in every other step.

scale: nothing is trained. The plan of all ranks is made of the shapes of a model, as every rank makes it in its first
step. What a rank does with it is computed for the rank with the most matrix work; the last column tells which it is.
Llama-2-7B takes a minute and a half in all.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler reports each start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from bench.growth import compare_sizes
from bench.modes import compare_modes
from bench.optimizers import CHOICES, HEADS, OURS
from bench.ranks import compare_ranks
from bench.scale import HOSTS, MODELS, compare_worlds
from bench.shapes import MODELS as LARGE
from bench.shapes import compare_shapes
from memory.models import SIZES
from plots import make_folder
from rich.console import Console

COMMANDS = {
    "modes": compare_modes,
    "ranks": compare_ranks,
    "growth": compare_sizes,
    "scale": compare_worlds,
    "shapes": compare_shapes,
}


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    make_folder(flags.output_dir)
    torch.set_num_threads(flags.threads)
    COMMANDS[flags.command](flags, Console(width=150))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    usage = f"%(prog)s {{{','.join(COMMANDS)}}} [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        own = f"{parser.prog} {name} [options]"
        made = commands.add_parser(name, usage=own, help=about, description=about)
        made.add_argument("--output_dir", type=Path, default=Path(f"runs/{name}"), help=f"for files (runs/{name})")
        made.set_defaults(threads=1, device="cpu")
        if name not in ("scale", "shapes"):
            made.add_argument("--threads", type=int, help="of torch's CPU operations (1)")
            made.add_argument("--device", choices=("cpu", "cuda"), help="what computes (cpu)")
        return made

    modes = command("modes", "Shampoo4's modes and other optimizers in one process.")
    ranks = command("ranks", "AdamW and Shampoo4's modes on several processes.")
    for each, names in ((modes, tuple(CHOICES)), (ranks, ("adamw", *OURS))):
        each.add_argument("--hidden_size", type=int, default=384, help=f"of the ViT, a multiple of {HEADS} (384)")
        each.add_argument("--num_hidden_layers", type=int, default=2, help="of the ViT (2)")
        each.add_argument("--steps", type=int, default=30, help="timed steps of each optimizer (30)")
        each.add_argument("--interval", type=int, default=10, help="steps from one refresh to the next (10)")
        each.add_argument(
            "--only", nargs="+", choices=names, default=list(names), metavar="NAME",
            help=f"some of {', '.join(names)} (all); adamw is always among them",
        )  # fmt: skip
        each.add_argument("--eager", action="store_true", help="never use torch.compile")
    ranks.add_argument("--host", choices=("ddp", "fsdp2", "hsdp"), default="ddp", help="what wraps the model (ddp)")
    ranks.add_argument("--trace", type=Path, metavar="DIR", help="for Chrome traces of every optimizer and rank (none)")

    growth = command("growth", "Step times and states of Shampoo4 as parameters or blocks grow.")
    growth.set_defaults(eager=True, interval=2)
    sizes = [1e6, 3e6, 1e7, 3e7]
    growth.add_argument("--parameters", type=float, nargs="+", default=sizes, help="how many (1e6 3e6 1e7 3e7)")
    growth.add_argument("--block_sizes", type=int, nargs="+", default=[256], help="max_preconditioner_dim (256)")
    growth.add_argument("--steps", type=int, default=6, help="timed steps, each second one a refresh (6)")

    scale = command("scale", "What Shampoo4 would do in worlds of many ranks, computed from its plans.")
    scale.add_argument(
        "--models", nargs="+", choices=tuple(SIZES), default=list(MODELS), metavar="NAME",
        help=f"of {', '.join(SIZES)} ({' '.join(MODELS)})",
    )  # fmt: skip
    ranks_of = [1, 8, 64, 1024]
    scale.add_argument("--world_sizes", type=int, nargs="+", default=ranks_of, help="numbers of ranks (1 8 64 1024)")
    scale.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS), help="what wraps the model (all)")
    scale.add_argument("--node_size", type=int, default=8, help="ranks among which hsdp shards (8)")
    scale.add_argument("--method", choices=("soap", "shampoo"), default="soap", help="of the optimizer (soap)")
    scale.add_argument("--trace_memory", action="store_true", help="write the peak of planning's memory, slowly")

    shapes = command("shapes", "Blocks, refresh and bytes of factors of large models, from their shapes.")
    shapes.add_argument(
        "--models", nargs="+", choices=tuple(SIZES), default=list(LARGE), metavar="NAME",
        help=f"of {', '.join(SIZES)} ({' '.join(LARGE)})",
    )  # fmt: skip

    flags = parser.parse_args(arguments)
    counts = (
        "num_hidden_layers",
        "steps",
        "interval",
        "threads",
        "parameters",
        "block_sizes",
        "world_sizes",
        "node_size",
    )
    for name in counts:
        values = getattr(flags, name, 1)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} must be at least 1, got {values}")
    if flags.command == "growth" and flags.steps < 2:
        parser.error(f"--steps must be at least 2, got {flags.steps}")
    if getattr(flags, "hidden_size", HEADS) < HEADS or getattr(flags, "hidden_size", 0) % HEADS:
        parser.error(f"--hidden_size takes multiples of {HEADS}, got {flags.hidden_size}")
    if flags.command == "ranks" and "RANK" not in os.environ:
        parser.error("torchrun starts the processes: torchrun --nproc_per_node 2 launch/benchmark.py ranks")
    flags.device = torch.device(flags.device)
    return flags


if __name__ == "__main__":
    main()
