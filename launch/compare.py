"""Compare finished runs of train_vit.py: a table over seeds, and a picture of their training losses.

python launch/compare.py runs/* [--output comparison.png]

Runs are taken together when they used the same optimizer; "kept" is the share of 32-bit Shampoo's gain over AdamW in
the last epoch's training loss, over the seeds that all three have.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from vit_report import read_lines, readable_bytes

_NAMES = {
    "adamw": ("AdamW", "#5f6b76"),
    "shampoo32": ("32-bit Shampoo", "#2a6fbb"),
    "shampoo4": ("4-bit Shampoo", "#c8452d"),
    "shampoo4-naive": ("naive 4-bit", "#d9a441"),
    "sgd": ("SGD", "#7a5195"),
}

Runs = dict[str, dict[int, dict[str, Any]]]  # optimizer -> seed -> results


def read_runs(folders: list[Path]) -> Runs:
    """The results of every folder that holds a finished run."""
    runs: Runs = defaultdict(dict)
    for folder in folders:
        path = folder / "all_results.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        options = results["options"]
        if options["seed"] in runs[options["optimizer"]]:
            raise SystemExit(f"{folder}: a second run of {options['optimizer']} with seed {options['seed']}")
        runs[options["optimizer"]][options["seed"]] = {**results, "folder": folder}
    if not runs:
        raise SystemExit("no finished run among the folders given")
    return {name: dict(sorted(runs[name].items())) for name in _NAMES if name in runs}


def kept_share(runs: Runs, optimizer: str) -> float | None:
    """Share of 32-bit Shampoo's gain over AdamW that ``optimizer`` has, by the mean training losses."""
    seeds = set.intersection(*(set(runs.get(name, {})) for name in ("adamw", "shampoo32", optimizer)))
    if not seeds:
        return None
    adamw, full, own = (
        statistics.mean(runs[name][seed]["train_loss"] for seed in seeds) for name in ("adamw", "shampoo32", optimizer)
    )
    return (adamw - own) / (adamw - full)


def print_table(runs: Runs) -> None:
    table = Table()
    columns = ("optimizer", "seeds", "training loss", "accuracy", "kept", "preconditioner", "all state", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, seeds in runs.items():
        results = list(seeds.values())
        held = results[0]["state_bytes"]
        kept = kept_share(runs, name)
        table.add_row(
            _NAMES[name][0],
            ", ".join(map(str, seeds)),
            " / ".join(f"{run['train_loss']:.4f}" for run in results),
            " / ".join(f"{run['eval_accuracy']:.3f}" for run in results),
            "" if kept is None else f"{kept:.2f}",
            readable_bytes(held["preconditioner"]),
            readable_bytes(sum(held.values())),
            f"{statistics.mean(run['total_seconds'] for run in results):.0f}",
        )
    Console(width=150).print(table)


def draw(runs: Runs, path: Path) -> None:
    """Mean training loss over the seeds, the band between the lowest and the highest, and bars of state bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(12, 4.4), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    for name, seeds in runs.items():
        label, color = _NAMES[name]
        logs = [read_lines(run["folder"] / "metrics.jsonl") for run in seeds.values()]
        series = [{line["step"]: line["loss"] for line in log if "loss" in line} for log in logs]
        steps = sorted(set.intersection(*map(set, series)))
        values = [[one[step] for one in series] for step in steps]
        curves.plot(steps, [statistics.mean(v) for v in values], color=color, label=label, linewidth=1.8)
        curves.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
    curves.set(xlabel="step", ylabel="training loss", xlim=(0, None), yscale="log")
    curves.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    curves.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    curves.grid(alpha=0.25, which="both")
    curves.legend(frameon=False)

    held = {name: next(iter(seeds.values()))["state_bytes"] for name, seeds in runs.items()}
    labels = [_NAMES[name][0] for name in held]
    base, own = ([value[key] / 1e6 for value in held.values()] for key in ("base", "preconditioner"))
    bars.barh(labels, base, color="#b9c2cb", label="base optimizer")
    bars.barh(labels, own, left=base, color=[_NAMES[name][1] for name in held])
    bars.legend(frameon=False, loc="lower right")
    bars.invert_yaxis()
    bars.set(xlabel="MB of optimizer state")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_vit.py")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"))
    flags = parser.parse_args()
    runs = read_runs(flags.runs)
    print_table(runs)
    draw(runs, flags.output)
    print(f"picture  {flags.output}")


if __name__ == "__main__":
    main()
