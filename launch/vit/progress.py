"""What a run must remember: its progress, and checkpoints that count only once they are complete."""

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
from accelerate.utils import broadcast_object_list
from torch import Tensor

logger = get_logger("train_vit")

MARKER = "complete.json"  # written last: a checkpoint without it is half of one
_IDENTITY = ("seed", "optimizer", "step_images", "epoch_steps")  # a run that differs in these cannot go on
_HARMLESS = (  # options that change no number of the training
    *("output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("logging_steps", "log_health", "with_tracking", "ddp_timeout", "scratch_mib", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "cache_images_gb"),
)


@dataclass
class Progress:
    """How far a run is. Registered with Accelerate, so it is saved and loaded with the rest."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0
    epoch_losses: list[float] = field(default_factory=list)  # of the current epoch's steps
    unlogged_losses: list[float] = field(default_factory=list)  # of the steps since the last line of the log
    evaluation: dict[str, float] = field(default_factory=dict)  # the newest one
    best_accuracy: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        vars(self).update(state)

    def collect(self, losses: list[Tensor], micro_batches: int, accelerator: Accelerator) -> None:
        """Move losses that are on the device here. Every process must call this together.

        Args:
            losses: of this process's micro-batches since the last call, whole steps; emptied.
            micro_batches: of a step.
            accelerator: of the run.

        Raises:
            FloatingPointError: on every process alike, for a loss that is not finite; it names the step.
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
                    "--num_warmup_steps or lower --max_grad_norm; checkpoints before this step are sound"
                )
        self.epoch_losses += steps
        self.unlogged_losses += steps


class Checkpoints:
    """Folders ``checkpoint-STEP`` in a run's output folder.

    Args:
        accelerator: of the run, all of whose state is saved.
        output_dir: the folder.
        limit: how many are kept; None keeps all.
        options: of the run, noted in each of them.
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
            shutil.rmtree(folder)  # left by a run that was cut off, or by one that went on from before this step
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            draft = folder / f"{MARKER}.tmp"  # renamed: whoever finds the file finds all of it
            draft.write_text(json.dumps({"step": step, "options": self.options}, indent=1))
            draft.replace(folder / MARKER)
            self._prune()
        self.accelerator.wait_for_everyone()

    def begin(self, source: str | None, overwrite: bool) -> None:
        """Resume, or start anew. The main process decides for all: what each sees of the file system may differ.

        Args:
            source: a checkpoint, or ``"latest"``, which starts anew where there is none; None starts anew.
            overwrite: remove an older run's checkpoints when starting anew, which they forbid otherwise.

        Raises:
            ValueError: on every process alike: there is no such checkpoint, or it is of another run; or there are
                checkpoints where the run should start anew.
        """
        decision: list[str | None] = [None, None]  # the folder to load, or what is wrong
        if self.accelerator.is_main_process:
            try:
                if source is None:
                    self._make_room(overwrite)
                elif (folder := self._choose(source)) is not None:
                    decision[0] = str(folder)
            except (OSError, ValueError) as error:
                decision[1] = str(error)
        folder_name, problem = broadcast_object_list(decision)
        if problem:
            raise ValueError(problem)
        if folder_name:
            self.accelerator.load_state(folder_name)
            logger.info(f"Resumed from {folder_name}")

    def _make_room(self, overwrite: bool) -> None:
        for folder in self._folders():
            if not overwrite:
                raise ValueError(
                    f"--output_dir {self.output_dir} holds checkpoints of a run: give --resume_from_checkpoint latest "
                    "to go on with it, --overwrite_output_dir to start anew, or another folder"
                )
            shutil.rmtree(folder)

    def _folders(self) -> list[Path]:
        """All checkpoints, complete or not, in the order of their steps."""
        named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.output_dir.glob("*"))
        return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]

    def _choose(self, source: str) -> Path | None:
        for folder in [Path(source)] if source != "latest" else reversed(self._folders()):
            if (folder / MARKER).exists():
                self._check(folder)
                return folder
            if source != "latest":
                raise ValueError(f"--resume_from_checkpoint {folder} is no complete checkpoint: it has no {MARKER}")
            logger.warning(f"{folder} was never finished (no {MARKER}) and is passed over")
        logger.info("No checkpoint to resume from: starting at step 0")
        return None

    def _check(self, folder: Path) -> None:
        """Refuse a checkpoint of another run, and warn of options that have changed since."""
        saved = json.loads((folder / MARKER).read_text())["options"]
        now = json.loads(json.dumps(self.options))
        changed = [
            name for name in now.keys() | saved.keys() if saved.get(name) != now.get(name) and name not in _HARMLESS
        ]
        text = ", ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in sorted(changed))
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


class StopSignals:
    """SIGTERM and SIGUSR1, as clusters send them before they take a job's machines: not the end, but a request.

    Args:
        timeout: how long ``stop_now()`` waits for a process that does not answer.
    """

    EXIT_STATUS = 75  # of a run that was asked to stop, has saved itself and can go on (EX_TEMPFAIL of sysexits.h)

    def __init__(self, timeout: timedelta) -> None:
        self.received = False
        # A group of its own on the CPU: to ask it waits for no accelerator.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def end(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def stop_now(self) -> bool:
        """Whether any process was asked to stop. Every process must call this together."""
        asked = torch.tensor(self.received, dtype=torch.int32, device="cpu")
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return bool(asked)
