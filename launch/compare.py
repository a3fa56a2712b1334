"""Train with several optimizers by one recipe, or take finished runs, and show them side by side.

    python launch/compare.py runs/*                                     # finished runs of train_vit.py
    python launch/compare.py --output_dir runs/fashion --seeds 0 1 2 -- --dataset_name fashion-mnist --decay_all
    python launch/compare.py --output_dir runs/ablation --ablation -- --dataset_name fashion-mnist --decay_all
    python launch/compare.py --output_dir runs/rivals --tasks vit gpt --seeds 0 1 2      # with other optimizers, tuned
    python launch/compare.py --output_dir runs/widths --tasks vit gpt --hidden_sizes 64 128 256    # learning rates
    python launch/compare.py --output_dir runs/modes --modes -- --dataset_name fashion-mnist --decay_all

What stands after ``--`` goes to train_vit.py. A run that has finished is not made again, and a run that was cut
off is resumed. Both are refused if their options are not those of this command. A run that diverged is repeated if its
options have changed.
``--ablation`` varies code book, what is quantized, rectification and bits, as the paper's table 3 does. ``--modes``
takes each option of method="shampoo" that makes the state smaller or the steps more even by itself, and those of its
compact preset together.

A table over seeds and ``comparison.png``: training loss by step and by time, accuracy by epoch, state bytes. "kept",
where there is one, is the share of 32-bit Shampoo's gain over AdamW in the last epoch's training loss, over the seeds
that all three have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plots import make_folder
from torch import nn
from vit.args import DataArguments, ModelArguments, TrainingArguments
from vit.args import parse_args as parse_training_args
from vit.optim import OPTIMIZERS as NAMED
from vit.optim import build_optimizer
from vit.progress import changed_options, cut_off_options
from vit.side_by_side import Runs, draw, label_of, print_table

TRAIN = Path(__file__).with_name("train_vit.py")

# What is compared: flags of train_vit.py by the folder's name.
OPTIMIZERS: dict[str, tuple[str, ...]] = {name: ("--optimizer", name) for name in NAMED}
_VARIANTS: dict[str, tuple[str, ...]] = {
    "naive": ("--optimizer", "shampoo4-naive"),
    "tree": ("--optimizer", "shampoo4-paper", "--codebook", "dynamic_tree"),
    "unrectified": ("--optimizer", "shampoo4-paper", "--rectify_steps", "0", "0"),
    "rectified": ("--optimizer", "shampoo4-paper"),
}
ABLATION = {
    **{name: OPTIMIZERS[name] for name in ("adamw", "shampoo32")},
    **{f"{name}-{bits}": (*flags, "--bits", str(bits)) for bits in (4, 3) for name, flags in _VARIANTS.items()},
}
_MODES: dict[str, tuple[str, ...]] = {
    "implicit": ("--root", "implicit"),
    "scales": ("--scale_dtype", "bfloat16"),
    "normal": ("--codebook", "normal"),
    "iterations": ("--refresh_iterations", "2"),
    "staggered": ("--refresh", "staggered"),
    "products": ("--matmul_dtype", "bfloat16"),
    "compact": ("--preset", "shampoo-compact"),
    "compact-staggered": ("--preset", "shampoo-compact", "--refresh", "staggered"),
}
MODES = {
    **{name: OPTIMIZERS[name] for name in ("adamw", "shampoo32", "shampoo4-paper")},
    **{name: ("--optimizer", "shampoo4-paper", *flags) for name, flags in _MODES.items()},
}
_OPTIONS = "options "  # begins the first line of diverged.txt
_OURS = ("seed", "optimizer", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")  # differ by the run


def distinct(variants: dict[str, tuple[str, ...]], flags: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Leave out variants that ``flags`` make equal to an earlier one, as a recipe's preset does.

    Raises:
        SystemExit, ValueError: an option is wrong.
    """
    options: dict[str, dict[str, Any]] = {}
    for name, own in variants.items():
        group = build_optimizer(parse_training_args([*flags, *own]), nn.Linear(2, 2)).param_groups[0]
        found = {key: value for key, value in group.items() if key != "params"}
        twin = next((other for other in options if options[other] == found), None)
        if twin is None:
            options[name] = found
        else:
            print(f"{name} is left out: with these flags it is the same as {twin}")
    return {name: variants[name] for name in options}


def changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Say of each option that changes the training and differs what it was and is.

    An option that an older version did not have was at its default.
    """
    known = {**asdict(DataArguments()), **asdict(ModelArguments()), **asdict(TrainingArguments())}
    return changed_options({**known, **saved}, {**known, **now})


def missing(folder: Path, now: dict[str, Any]) -> tuple[str, ...] | None:
    """The flags with which the run in ``folder`` starts or goes on; None if there is nothing to do.

    Args:
        folder: of the run.
        now: its options.

    Raises:
        SystemExit: the folder holds a run with other options.
    """
    finished, diverged = folder / "all_results.json", folder / "diverged.txt"
    if diverged.exists() and not finished.exists():
        first = diverged.read_text().partition("\n")[0]
        saved = json.loads(first.removeprefix(_OPTIONS)) if first.startswith(_OPTIONS) else now  # an older file
        return ("--overwrite_output_dir",) if changes(saved, now) else None
    saved = json.loads(finished.read_text())["options"] if finished.exists() else cut_off_options(folder)
    changed = changes(saved, now) if saved is not None else {}
    if changed:
        raise SystemExit(
            f"{folder} holds a run with other options: {', '.join(changed.values())}. Give another --output_dir, or "
            "remove that folder"
        )
    return None if finished.exists() else ("--resume_from_checkpoint", "latest")


def train(output_dir: Path, variants: dict[str, tuple[str, ...]], seeds: Sequence[int], flags: Sequence[str]) -> None:
    """Make the runs that have not finished yet, one after the other.

    Raises:
        SystemExit: a run fails, or a folder holds a run with other options, before any is made. A loss that is not
            finite, as with 3 bits and no rectification, is a result.
    """
    planned = []
    for seed in dict.fromkeys(seeds):
        for name, own in variants.items():
            folder = output_dir / f"{name}-seed{seed}"
            given = [*flags, *own, "--seed", str(seed), "--output_dir", str(folder)]
            options = parse_training_args(given).flat()
            start = missing(folder, options)
            if start is not None:
                planned.append((folder, [*given, *start], options))
    for folder, given, options in planned:
        print(f"training {folder}", flush=True)
        diverged = folder / "diverged.txt"
        diverged.unlink(missing_ok=True)  # of other options
        process = subprocess.run([sys.executable, str(TRAIN), *given], stderr=subprocess.PIPE, text=True)
        if process.returncode and "FloatingPointError" in process.stderr:
            diverged.write_text(f"{_OPTIONS}{json.dumps(options)}\n{process.stderr[-2000:]}")
        elif process.returncode:
            raise SystemExit(f"{folder}: status {process.returncode}\n{process.stderr[-3000:]}")


def read_runs(folders: Sequence[Path]) -> Runs:
    """The results of every folder that holds a finished run; other folders are named and left out.

    A label gets the folder if another run has the same label and seed, or the same label and other options.
    """
    runs: Runs = defaultdict(dict)
    for folder in dict.fromkeys(folders):
        path = folder / "all_results.json"
        if not path.exists():
            diverged = (folder / "diverged.txt").exists()
            why = ": it diverged" if diverged else "" if folder.is_dir() else ": there is no such folder"
            print(f"{folder} holds no finished run{why}")
            continue
        results = json.loads(path.read_text())
        name, length, seed = label_of(results), f"{results['epochs']:g} epochs", results["options"]["seed"]
        others = runs[f"{name}, {length}"]
        first = next(iter(others.values()), results)["options"]
        if seed in others or changes(first, results["options"]).keys() - {"seed"}:
            name = f"{name} ({folder})"
        runs[f"{name}, {length}"][seed] = {**results, "folder": folder, "name": name}
    if not runs:
        raise SystemExit("no finished run among the folders given")
    if len({label.rpartition(", ")[2] for label in runs}) == 1:  # all as long: no need to say it
        runs = {label.rpartition(", ")[0]: seeds for label, seeds in runs.items()}
    order = ("AdamW", "SGD", "32-bit", "4-bit", "3-bit", "8-bit", "SOAP")
    labels = sorted(
        runs, key=lambda label: next((i for i, each in enumerate(order) if label.startswith(each)), len(order))
    )
    return {label: dict(sorted(runs[label].items())) for label in labels}


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse our own flags, and find those for train_vit.py."""
    usage = "%(prog)s RUN ... | --output_dir DIR [options] [-- FLAGS OF train_vit.py]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="output folders of finished runs")
    add("--output_dir", type=Path, help="make runs in this folder, and compare what it holds")
    usual = ["adamw", "shampoo32", "shampoo4-paper", "shampoo4"]
    add("--optimizers", nargs="+", choices=list(OPTIMIZERS), help=f"what to train ({' '.join(usual)})")
    add("--seeds", nargs="+", type=int, default=[0], help="one run of each optimizer for each (0)")
    sets = parser.add_mutually_exclusive_group()
    add("--tasks", nargs="+", choices=["vit", "gpt"], help="compare with other optimizers, each at its own best rate")
    for name, help in (
        ("--ablation", "code book, what is quantized, rectification, 4 and 3 bits"),
        ("--modes", "roots, scales, levels, QR steps, staggered factors, bfloat16 products, compact settings"),
    ):
        sets.add_argument(name, action="store_true", help=help)
    add("--hidden_sizes", nargs="+", type=int, help="with --tasks: find the best learning rate at each width")
    add("--steps", type=int, default=150, help="with --hidden_sizes: of every run (150)")
    add("--workers", type=int, default=1, help="with --tasks: runs at a time, as many as cores at most (1)")
    add("--output", type=Path, help="the picture (default: comparison.png in --output_dir, or here)")
    given = list(sys.argv[1:] if argv is None else argv)
    flags = given[given.index("--") + 1 :] if "--" in given else []
    args = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    if bool(args.runs) == bool(args.output_dir):
        parser.error("give either folders of finished runs, or --output_dir to make runs in")
    if args.hidden_sizes and not args.tasks:
        parser.error("--hidden_sizes needs --tasks")
    if args.runs and (flags or args.optimizers or args.ablation or args.modes):
        parser.error("--optimizers, --ablation, --modes and flags for train_vit.py need --output_dir")
    if args.optimizers and (args.ablation or args.modes):
        parser.error("--ablation and --modes choose the optimizers themselves: drop --optimizers")
    if args.tasks and (flags or args.optimizers or args.ablation or args.modes):
        parser.error("--tasks chooses optimizers and flags itself: drop --optimizers, --ablation, --modes and --")
    for flag in flags:
        name = flag.partition("=")[0].lstrip("-").replace("-", "_")
        if flag.startswith("--") and name in _OURS:
            parser.error(f"{flag} after -- has no effect: give --seeds, --optimizers and --output_dir before --")
    args.optimizers = args.optimizers or usual
    args.output = args.output or (args.output_dir or Path()) / "comparison.png"
    return args, flags


def main(argv: Sequence[str] | None = None) -> None:
    """Train if asked to, then compare."""
    args, flags = parse_args(argv)
    make_folder(args.output.parent)
    if args.output_dir:
        make_folder(args.output_dir)
    if args.hidden_sizes:
        from rivals.widths import compare_widths

        compare_widths(args.tasks, args.hidden_sizes, args.steps, args.seeds, args.output_dir, args.workers)
        return
    if args.tasks:
        from rivals.contest import RIVALS, compare  # needs the optimizers' packages

        compare(list(RIVALS), args.tasks, args.seeds, args.output_dir, args.workers)
        return
    folders = args.runs
    if args.output_dir:
        chosen = {name: OPTIMIZERS[name] for name in args.optimizers}
        variants = distinct(ABLATION if args.ablation else MODES if args.modes else chosen, flags)
        train(args.output_dir, variants, args.seeds, flags)
        folders = [args.output_dir / f"{name}-seed{seed}" for seed in args.seeds for name in variants]
    runs = read_runs(folders)
    print_table(runs)
    draw(runs, args.output)
    print(f"picture  {args.output}")


if __name__ == "__main__":
    main()
