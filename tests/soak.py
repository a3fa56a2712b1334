"""Runs that are killed and resumed over and over, under hosts, rank counts and options drawn by chance.

    python tests/soak.py --minutes 30 --seed 0

First replayed: small models are trained on gradients that are known in advance, by one host after the other, each of
which is killed or ends, and leaves a portable checkpoint to the next. After every step, the weights must be bitwise
those of one process that was never stopped. Then launched: ``accelerate launch launch/train_vit.py`` is killed, or
asked to stop, and resumed with ``--resume_from_checkpoint latest``; all its losses must be those of an uninterrupted
run.

Any difference ends the soak with status 1, and says which seed, options and hosts led to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from support import worlds as hosts
from support import zero_worlds as zero
from support.launching import LAUNCH, accelerate, environment, losses
from support.training import ALL, Training
from torch import Tensor

from sharded_shampoo4 import checkpoint

STEPS = 60  # of a replayed run
WORLDS = (1, 2, 2, 3, 4)
LAUNCHED = (None, "ddp", "fsdp1", "fsdp2", "zero2", "zero3")  # files of launch/configs; None: one process
FLAGS = (
    *("--max_train_steps", 60, "--max_train_samples", 640, "--max_eval_samples", 128, "--num_hidden_layers", 2),
    *("--method", "shampoo", "--statistics_interval", 3, "--root_interval", 6),
    *("--learning_rate", 3e-3, "--logging_steps", 1),
    *("--checkpointing_steps", 4, "--checkpoints_total_limit", 2, "--per_device_train_batch_size", 16),
)


class Difference(AssertionError):
    """A run that was stopped is not the one that was not."""


# -- replayed ----------------------------------------------------------------------------------------------------------


def draw_options(chance: random.Random) -> dict[str, Any]:
    """Options that make sense together, of either method."""
    if chance.random() < 0.5:
        return draw_options_of_soap(chance)
    bits = chance.choice((3, 4, 4, 8, 32))
    base = chance.choice(({"base": "adamw"}, {"base": "sgd", "momentum": 0.9}, {"base": "adagrad"}))
    statistics = chance.choice((1, 2, 3))
    return {
        **base,
        "method": "shampoo",
        "kind": chance.choice(("mlp", "vit")),
        "bits": bits,
        "quantize": chance.choice(("eigenbasis", "preconditioner")) if bits < 32 else "eigenbasis",
        "codebook": chance.choice(("linear2", "dynamic_tree")),
        "quant_block_size": chance.choice((16, 64)),
        "max_preconditioner_dim": chance.choice((24, 30, 50, 1024)),
        "min_quant_numel": chance.choice((0, 600)),
        "split": chance.choice(("aligned", "even", "remainder")),
        "grafting": chance.choice(("parameter", "block", "none")),
        "statistics_interval": statistics,
        "root_interval": statistics * chance.choice((1, 2)),
        "weight_decay": chance.choice((0.0, 0.01)),
        "lr": 1e-3,
    }


def draw_options_of_soap(chance: random.Random) -> dict[str, Any]:
    bits = chance.choice((3, 4, 8, 8, 32))
    return {
        **chance.choice(({"base": "adamw"}, {"base": "sgd", "momentum": 0.9}, {"base": "adagrad"})),
        "method": "soap",
        "kind": chance.choice(("mlp", "vit")),
        "bits": bits,
        "codebook": chance.choice(("linear2", "dynamic_tree", "normal")),
        "quant_block_size": chance.choice((16, 64)),
        "max_preconditioner_dim": chance.choice((24, 30, 50, 1024)),
        "min_quant_numel": chance.choice((0, 600)),
        "split": chance.choice(("aligned", "even", "remainder")),
        "refresh": chance.choice(("together", "staggered")),
        "momentum_dtype": chance.choice(("float32", "bfloat16", "int8")),
        "second_moment_dtype": chance.choice(("float32", "bfloat16", "int8")),
        "statistics_interval": chance.choice((1, 2, 3)),
        "weight_decay": chance.choice((0.0, 0.01)),
        "lr": 1e-3,
    }


def reference(options: dict[str, Any]) -> list[str]:
    """The weights before the first step and after each, in one process that is never stopped."""
    with hosts.one_thread():
        training = Training("none", **options)
        first = training.parameters()
        return [hosts.digest(weights) for weights in (first, *(training.train(range(s, s + 1)) for s in range(STEPS)))]


def segment(rank: int, folder: str, host: str, options: dict[str, Any], plan: dict[str, Any]) -> int:
    """Go on from the checkpoint in ``folder``, if there is one, for some steps or until killed; the last step's number.

    Process 0 notes every step, with the weights after it, in a file that outlives it.
    """
    warnings.simplefilter("ignore")
    if host.startswith("zero"):
        zero.prepare()
    resumes = (Path(folder) / checkpoint.MANIFEST).exists()
    training = Training(host, seed=int(resumes), **options)  # other weights, if they are to be replaced
    begin = saved_step(Path(folder)) if resumes else 0
    if resumes:
        training.load(folder)
    note(rank, folder, "begun", begin, training.parameters())
    if rank == plan["victim"]:
        threading.Timer(plan["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    pending = None
    end = min(begin + plan["steps"], STEPS)
    for step in range(begin + 1, end + 1):
        note(rank, folder, "done", step, training.train(range(step - 1, step)))
        if step % plan["every"] == 0 or step == STEPS:
            if plan["background"]:
                pending = checkpoint.async_save(training.handle, folder, model=training.model)
            else:
                training.save(folder)
    if pending is not None:
        pending.result()
    return end


def note(rank: int, folder: str, what: str, step: int, weights: dict[str, Tensor]) -> None:
    if rank == 0:
        with (Path(folder) / "steps.log").open("a") as log:
            log.write(f"{what} {step} {hosts.digest(weights)}\n")


def saved_step(folder: Path) -> int:
    """Steps that a checkpoint's run had made."""
    parameters = checkpoint.read_manifest(folder)["parameters"].values()
    return max(int(entry["factors"]["step"]) for entry in parameters if "factors" in entry)


class Replayed:
    """Counts, over all replayed runs."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.runs, self.cycles, self.kills, self.steps, self.repeated, self.cut_off = 0, 0, 0, 0, 0, 0
        self.by_host: Counter[str] = Counter()

    def run(self, folder: Path, until: float) -> None:
        """One run to its last step, through as many hosts as it takes."""
        options = draw_options(self.chance)
        expected = reference(options)
        last = 0  # step that was reached by the segments so far
        folder.mkdir()
        self.runs += 1
        while last < STEPS and time.monotonic() < until:
            host, world = self.chance.choice((*ALL, "none")), self.chance.choice(WORLDS)
            if host == "none":
                world = 1
            kill = self.chance.random() < 0.6
            plan = {
                "steps": self.chance.randint(2, 20),
                "every": self.chance.randint(1, 4),
                "background": self.chance.random() < 0.3,
                "victim": self.chance.randrange(world) if kill else None,
                "seconds": self.chance.uniform(0.0, 0.8),
            }
            story = f"{options} under {host} on {world} ranks, {plan}"
            (folder / "steps.log").unlink(missing_ok=True)
            ended = True
            try:
                hosts.run_ranks(world, segment, str(folder), host, options, plan)
            except hosts.RankError as error:
                ended = False
                if not kill:
                    raise Difference(f"{error}\n{story}") from error
            last = self._check(folder, expected, last, story)
            self.cycles += 1
            self.kills += not ended
            self.cut_off += len(list(folder.glob("data-*"))) > 1 or len(list(folder.glob("manifest.json.*"))) > 0
            self.by_host[f"{host} x{world}"] += 1
        shutil.rmtree(folder)

    def _check(self, folder: Path, expected: list[str], last: int, story: str) -> int:
        """Compare the noted weights with the reference's; the step from which the next segment will go on."""
        log = folder / "steps.log"
        noted = [line.split() for line in log.read_text().splitlines() if line.count(" ") == 2] if log.exists() else []
        for what, step, found in noted:
            if len(found) == 64 and found != expected[int(step)]:
                raise Difference(f"{what} {step}: other weights than those of an uninterrupted run\n{story}")
            if what == "begun" and int(step) < last:
                raise Difference(f"a checkpoint of step {last} was there, {step} was loaded\n{story}")
        done = [int(step) for what, step, _ in noted if what == "done"]
        saved = saved_step(folder) if (folder / checkpoint.MANIFEST).exists() else 0
        self.steps += len(done)
        self.repeated += max(0, max(done, default=saved) - saved)
        return saved

    def report(self) -> dict[str, Any]:
        """What was done."""
        return {
            "runs": self.runs,
            "cycles": self.cycles,
            "killed": self.kills,
            "killed in the middle of a save": self.cut_off,
            "steps compared, all bitwise equal": self.steps,
            "steps lost to kills": self.repeated,
            "cycles by host and ranks": dict(sorted(self.by_host.items())),
        }


# -- launched ----------------------------------------------------------------------------------------------------------


class Launched:
    """Real trainings, killed and resumed by the launcher."""

    def __init__(self, chance: random.Random, folder: Path) -> None:
        self.chance, self.folder = chance, folder
        self.cycles, self.signals, self.lost = 0, Counter[str](), 0
        self.whole: dict[str | None, list[float]] = {}
        self.runs: Counter[str] = Counter()

    def run(self, host: str | None, until: float) -> None:
        """One training to its end under ``host``, with stops on the way, and the same without any the first time."""
        if time.monotonic() > until:
            return
        if host not in self.whole:
            folder = self.folder / f"{host} whole"
            self._launch(host, folder, None, 0.0)
            self.whole[host] = losses(folder)
        folder = self.folder / f"{host} stopped"
        shutil.rmtree(folder, ignore_errors=True)
        while not (folder / "all_results.json").exists():
            if time.monotonic() > until:
                return
            number = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, None))
            before = self._steps(folder)
            self._launch(host, folder, number, self.chance.uniform(0.2, 2.5))
            self.cycles += 1
            self.signals[number.name if number else "none"] += 1
            kept = sorted(int(path.parent.name[11:]) for path in folder.glob("checkpoint-*/complete.json"))
            if not (folder / "all_results.json").exists():
                if number is None:
                    raise Difference(f"{host}: a run that nobody stopped did not end: {folder}")
                self.lost += self._steps(folder) - (kept[-1] if kept else 0)
                if kept and kept[-1] < before - 8:
                    raise Difference(f"{host}: checkpoints got older: {kept} after step {before}")
        self.runs[str(host)] += 1
        if losses(folder) != self.whole[host]:
            raise Difference(f"{host}: other losses than those of the uninterrupted run: {folder}")

    def _steps(self, folder: Path) -> int:
        log = folder / "metrics.jsonl"
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
        return max(steps, default=0)

    def _launch(self, host: str | None, folder: Path, number: signal.Signals | None, seconds: float) -> None:
        """Train; ``seconds`` after the first new step, send a signal to one of the processes that train."""
        launcher = accelerate(host, 2) if host else (sys.executable,)
        resume = ("--resume_from_checkpoint", "latest")
        command = [*launcher, LAUNCH / "train_vit.py", "--output_dir", folder, *FLAGS, *resume]
        log = folder / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        begun = time.time()
        with (self.folder / "log.txt").open("w") as out:
            process = subprocess.Popen(list(map(str, command)), env=environment(), stdout=out, stderr=out)
            while number is not None and process.poll() is None:
                time.sleep(0.02)
                if log.exists() and log.stat().st_mtime > begun and log.stat().st_size != size:
                    time.sleep(seconds)
                    self._signal(process, number)
                    break
            try:
                process.wait(timeout=240)
            finally:
                process.kill()

    def _signal(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(self.chance.choice([int(pid) for pid in children] or [process.pid]), number)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it has ended by itself

    def report(self) -> dict[str, Any]:
        """What was done."""
        return {
            "runs, all losses equal to the uninterrupted run's": dict(self.runs),
            "launches": self.cycles,
            "signals": dict(self.signals),
            "steps lost": self.lost,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop, at the latest")
    parser.add_argument("--launched", type=float, default=0.4, help="share of the time for launched trainings")
    parser.add_argument("--seed", type=int, default=None, help="what is drawn; by default another one each time")
    parser.add_argument("--output", type=Path, default=Path("runs/soak.json"), help="where the counts go")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    begun = time.monotonic()
    end, middle = begun + 60 * args.minutes - 20, begun + 60 * args.minutes * (1 - args.launched)
    warnings.simplefilter("ignore")
    hosts.PRELOADED.append("__main__")
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        replayed, launched = Replayed(chance), Launched(chance, Path(folder))
        try:
            while time.monotonic() < middle:
                replayed.run(Path(folder) / f"run-{replayed.runs}", middle)
                print(f"{time.monotonic() - begun:6.0f} s, {replayed.runs} runs, {replayed.cycles} cycles", flush=True)
            while time.monotonic() < end:
                for host in LAUNCHED:
                    launched.run(host, end)
                    print(f"{time.monotonic() - begun:6.0f} s, {launched.cycles} launches, {host}", flush=True)
        except Difference as error:
            sys.exit(f"seed {seed}: {error}")
        finally:
            report = {"seed": seed, "seconds": round(time.monotonic() - begun)}
            report.update({"replayed": replayed.report(), "launched": launched.report()})
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
