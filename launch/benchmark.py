"""Step times, state bytes and transient memory of Shampoo4 and of other optimizers.

    python launch/benchmark.py modes                            each mode of ours, and other optimizers, in one process
    python launch/benchmark.py modes --num_hidden_layers 6      the larger model
    python launch/benchmark.py ranks --ranks 2 --host fsdp2     processes: step times, bytes sent, the exchange's share
    torchrun --nproc_per_node 8 launch/benchmark.py ranks       the same on processes that torchrun starts, on any nodes
    python launch/benchmark.py growth                           step times and states as parameters or blocks grow

Each writes a table and a JSON file to --output_dir; modes and growth also draw a picture.

modes: the model is a vision transformer on 32 x 32 images in patches of 4. Its gradients for a few batches of random
images are computed once and replayed, so that only optimizers are timed. All of them get the same parameters and take
turns at each step, each on its own copy, so that whatever else loads the machine slows all alike. "CPU" is processor
time, "wall" elapsed time. A refresh is a step in which statistics and roots, or an eigenbasis, are due.

State: all tensors that an optimizer keeps, beside parameters and gradients. Transient: the most that a step has
allocated at any moment beyond its start; median and largest of one interval. The floor of an ordinary step of ours is
what cannot be avoided while roots are applied as matrices: the products L^(-1/4) G R^(-1/4) of all blocks in float32,
measured alone in the same run, and the step of torch's AdamW. An ordinary step of ours is one at which neither
statistics nor roots are due; of the staggered mode, where some are due at every step, it is every step.

launch/RESULTS.md has the settings of each optimizer. Muon multiplies in bfloat16, which takes seconds on a CPU that has
no instructions for it. heavyball, torchao and shampoo4-compiled use torch.compile; on a CPU heavyball runs eagerly
unless --compile_all is given, since compiling takes it many minutes. The column "graph" tells. A peer that is not
installed is named with the reason and the command that installs it; one that raises, with its error.

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
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler reports each start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from bench.growth import compare_sizes
from bench.modes import compare_modes
from bench.optimizers import CHOICES, HEADS, OURS
from bench.ranks import compare_ranks
from rich.console import Console

COMMANDS = {"modes": compare_modes, "ranks": compare_ranks, "growth": compare_sizes}


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(flags.threads)
    COMMANDS[flags.command](flags, Console(width=150))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.add_argument("--threads", type=int, default=1, help="of torch's CPU operations (1)")
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes (cpu)")
        made.add_argument("--output_dir", type=Path, default=Path(f"runs/{name}"), help=f"for files (runs/{name})")
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
        compiling = each.add_mutually_exclusive_group()
        compiling.add_argument("--eager", action="store_true", help="compile nothing (some, see above)")
        if each is modes:
            compiling.add_argument("--compile_all", action="store_true", help="compile whatever can be (some)")
    ranks.add_argument("--ranks", type=int, default=2, help="processes, unless torchrun has started them (2)")
    ranks.add_argument("--host", choices=("ddp", "fsdp2", "hsdp"), default="ddp", help="what wraps the model (ddp)")
    ranks.add_argument("--trace", type=Path, metavar="DIR", help="for Chrome traces of every optimizer and rank (none)")

    growth = command("growth", "Step times and states of Shampoo4 as parameters or blocks grow.")
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


if __name__ == "__main__":
    main()
