"""The progress of a run, its checkpoints, and signals that stop it."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from sharded_shampoo4.integrations.accelerate import on_main_process

logger = get_logger("train_vit")

MARKER = "complete.json"  # written last: a checkpoint without it is incomplete
_IDENTITY = ("seed", "optimizer", "step_images", "epoch_steps")  # must be equal to resume
_HARMLESS = (  # options that do not change the training
    *("output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("logging_steps", "log_health", "with_tracking", "ddp_timeout", "scratch_mib", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "cache_images_gb", "local_rank", "recipe"),  # a recipe's own values are options too
)
RESULTS = ("all_results.json", "curves.png", "health.png")  # written at the end; the first one marks a finished run


def changed_options(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return a message for each option that differs, by its name; only for options that change the training."""
    now = json.loads(json.dumps(now))
    return {
        name: f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted(now.keys() | saved.keys())
        if name not in _HARMLESS and saved.get(name) != now.get(name)
    }


@dataclass
class Progress:
    """The progress of a run. Accelerate saves and loads it with the other states."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0
    epoch_losses: list[float] = field(default_factory=list)  # of the current epoch's steps
    unlogged_losses: list[float] = field(default_factory=list)  # of the steps since the last line of the log
    evaluation: dict[str, float] = field(default_factory=dict)  # the newest one
    best_accuracy: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all fields from a ``state_dict``."""
        vars(self).update(state)

    def collect(self, losses: list[Tensor], micro_batches: int, accelerator: Accelerator) -> None:
        """Average losses over micro-batches and processes, and move them to this object. All processes must call it.

        Args:
            losses: of this process's micro-batches since the last call, of whole steps. The list is emptied.
            micro_batches: number of micro-batches in a step.
            accelerator: of the run.

        Raises:
            FloatingPointError: a loss is not finite. All processes raise; the message names the step.
        """
        if not losses:
            return
        gathered = accelerator.gather(torch.stack(losses).float()).cpu().double()
        losses.clear()
        steps = gathered.view(accelerator.num_processes, -1, micro_batches).mean((0, 2)).tolist()
        for step, loss in enumerate(steps, self.step - len(steps) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the training loss of step {step} is {loss}. Lower --learning_rate, raise "
                    "--num_warmup_steps or lower --max_grad_norm; checkpoints before this step are good"
                )
        self.epoch_losses += steps
        self.unlogged_losses += steps


class Checkpoints:
    """The folders ``checkpoint-STEP`` in a run's output folder.

    Args:
        accelerator: of the run. It saves and loads all states.
        output_dir: the output folder.
        limit: number of checkpoints to keep; None keeps all.
        options: of the run, stored in each checkpoint.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, limit: int | None, options: dict[str, Any]) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.limit = limit
        self.options = options

    def save(self, step: int) -> None:
        """Save the run after ``step``, then remove the oldest checkpoints over the limit."""
        folder = self.output_dir / f"checkpoint-{step}"
        if self.accelerator.is_main_process and folder.exists():
            shutil.rmtree(folder)  # incomplete
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            draft = folder / f"{MARKER}.tmp"  # renamed, so that the marker is never incomplete
            draft.write_text(json.dumps({"step": step, "options": self.options}, indent=1))
            draft.replace(folder / MARKER)
            self._prune()
        self.accelerator.wait_for_everyone()

    def begin(self, source: str | None, overwrite: bool) -> None:
        """Resume from a checkpoint, or start at step 0. The main process decides for all processes.

        If it resumes, complete checkpoints of later steps are renamed, since the run repeats these steps.

        Args:
            source: a checkpoint; ``"latest"`` for the newest, if there is one; None to start at step 0.
            overwrite: remove checkpoints of an earlier run when starting at step 0.

        Raises:
            ValueError: the checkpoint does not exist or is of another run, or a run that starts at step 0 would meet
                checkpoints of an earlier one. All processes raise.
        """
        folder_name = on_main_process(self._decide, source, overwrite)
        if folder_name:
            self.accelerator.load_state(folder_name)
            logger.info(f"Resumed from {folder_name}")
            on_main_process(self._abandon_later, Path(folder_name))

    def _decide(self, source: str | None, overwrite: bool) -> str | None:
        """Return the folder to resume from, or None to start at step 0."""
        try:
            if source is not None:
                folder = self._choose(source)
                return None if folder is None else str(folder)
            self._make_room(overwrite)
        except OSError as error:
            raise ValueError(str(error)) from error
        return None

    def remove_results(self) -> None:
        """Remove results and pictures of an earlier end, or they would pass for those of this run."""
        if (self.output_dir / RESULTS[0]).exists():
            logger.info(f"{self.output_dir} holds the results of an earlier run, which this one replaces")
        for name in RESULTS:
            (self.output_dir / name).unlink(missing_ok=True)

    def _abandon_later(self, resumed: Path) -> None:
        """Rename complete checkpoints of later steps, so that they are neither resumed from nor pruned."""
        step = _marked(resumed)["step"]
        for folder in self._folders():
            if (folder / MARKER).exists() and _marked(folder)["step"] > step:
                abandoned = folder.with_name(f"abandoned-{folder.name}")
                if abandoned.exists():
                    shutil.rmtree(abandoned)
                folder.rename(abandoned)
                logger.warning(f"{folder} is later than step {step}, where this run goes on: now {abandoned.name}")

    def _make_room(self, overwrite: bool) -> None:
        for folder in self._folders():
            if not overwrite:
                raise ValueError(
                    f"--output_dir {self.output_dir} holds checkpoints of a run: give --resume_from_checkpoint latest "
                    "to go on with it, --overwrite_output_dir to start again, or another folder"
                )
            shutil.rmtree(folder)

    def _folders(self) -> list[Path]:
        """List all checkpoints, complete or not, in the order of their steps."""
        named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.output_dir.glob("*"))
        return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]

    def _choose(self, source: str) -> Path | None:
        for folder in [Path(source)] if source != "latest" else reversed(self._folders()):
            if (folder / MARKER).exists():
                self._check(folder)
                return folder
            if source != "latest":
                raise ValueError(f"--resume_from_checkpoint {folder} is no complete checkpoint: it has no {MARKER}")
            logger.warning(f"{folder} was never finished (no {MARKER}) and is skipped")
        logger.info("No checkpoint to resume from: starting at step 0")
        return None

    def _check(self, folder: Path) -> None:
        """Refuse a checkpoint of another run. Warn of other options that have changed."""
        changed = changed_options(_marked(folder)["options"], self.options)
        text = ", ".join(changed.values())
        if any(name in _IDENTITY for name in changed):
            raise ValueError(f"{folder} cannot be continued by this run: {text}")
        if changed:
            logger.warning(f"Options changed since {folder.name} (learning rate and decay stay as saved): {text}")

    def _prune(self) -> None:
        if self.limit is None:
            return
        folders = self._folders()
        keep = [folder for folder in folders if (folder / MARKER).exists()][-self.limit :]
        for folder in folders:
            if folder not in keep:
                shutil.rmtree(folder)


def cut_off_options(output_dir: Path) -> dict[str, Any] | None:
    """Return the options of the run that the newest checkpoint would go on with, or None without one."""
    found = [_marked(path.parent) for path in output_dir.glob(f"checkpoint-*/{MARKER}")]
    if not found:
        return None
    options = max(found, key=lambda marked: marked["step"])["options"]
    return {name: value for name, value in options.items() if name not in ("step_images", "epoch_steps")}


def _marked(folder: Path) -> dict[str, Any]:
    marked: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return marked


class StopSignals:
    """Records SIGTERM and SIGUSR1, which clusters send before they stop a job, so that the run can save first.

    Args:
        timeout: how long ``stop_now()`` waits for a process that does not answer.
    """

    EXIT_STATUS = 75  # of a run that has saved a checkpoint on request (EX_TEMPFAIL of sysexits.h)

    def __init__(self, timeout: timedelta) -> None:
        self.received = False
        # A group on the CPU, so that asking does not wait for an accelerator.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def end(self) -> None:
        """Restore the former signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def stop_now(self) -> bool:
        """Tell whether any process has received a signal. All processes must call it."""
        asked = torch.tensor(self.received, dtype=torch.int32, device="cpu")
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return bool(asked)
