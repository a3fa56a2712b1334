"""The optimizer's figures in the logs of a Trainer: health of the eigenbases, bytes of states, time of a step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sharded_shampoo4 import Shampoo4

from .accelerate import unwrapped

_WORST = {
    "orthogonality_error": max,
    "rectified_error": max,
    "smallest_eigenvalue": min,
    "largest_eigenvalue": max,
    "failures": max,
}


class LogOptimizer(TrainerCallback):
    """Adds the optimizer's figures to the Trainer's logs, whatever ``report_to`` says.

        trainer.add_callback(LogOptimizer(trainer))

    The worst of :meth:`Shampoo4.health` over all parameters (``optimizer_orthogonality_error`` and so on), the bytes of
    the states on the process that logs (``optimizer_state_bytes``), and the optimizer's own part of a step
    (``optimizer_ms_per_step``, the mean since the last log). Only steps that are logged look at the states.

    Args:
        trainer: whose logs they are added to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._figures: dict[str, float] = {}  # that wait for the log
        self._clock = _Clock()
        self._last = 0  # step that was logged

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a place before all callbacks that report, and start the clock."""
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(1, self)  # after the one that decides which steps are logged
        self._clock.watch(self._optimizer(kwargs["optimizer"]))
        self._last = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, in a step that is logged."""
        if control.should_log:
            self._measure(self._optimizer(kwargs["optimizer"]), state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, where epochs are logged."""
        self.on_step_end(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what was measured to the log, and to the Trainer's history."""
        kwargs["logs"].update(self._figures)
        state.log_history[-1].update(self._figures)
        self._figures = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._clock.stop()

    def _optimizer(self, wrapped: Any) -> Shampoo4:
        optimizer = unwrapped(wrapped)
        if optimizer is None:
            raise TypeError(f"LogOptimizer knows the figures of Shampoo4, and the Trainer trains with {wrapped!r}")
        return optimizer

    def _measure(self, optimizer: Shampoo4, step: int) -> None:
        if step == self._last:
            return
        health = list(optimizer.health().values())
        for name, worst in _WORST.items():
            values = [found[name] for found in health if not math.isnan(found[name])]
            if values:
                self._figures[f"optimizer_{name}"] = float(worst(values))
        self._figures["optimizer_state_bytes"] = sum(optimizer.state_bytes().values())
        self._figures["optimizer_ms_per_step"] = self._clock.milliseconds() / (step - self._last)
        self._last = step


class _Clock:
    """The time of an optimizer's steps. On accelerators their events are read when the sum is asked for."""

    def __init__(self) -> None:
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def watch(self, optimizer: Shampoo4) -> None:
        """Measure the steps of ``optimizer`` from now on."""
        self.stop()
        self._hooks = [optimizer.register_step_pre_hook(self._begin), optimizer.register_step_post_hook(self._end)]

    def stop(self) -> None:
        """Leave the optimizer alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._spans = [], []

    def milliseconds(self) -> float:
        """Sum up all steps since the last call."""
        spans, self._spans = self._spans, []
        if not spans or isinstance(self._begun, float):
            return float(sum(end - begin for begin, end in spans) * 1e3)
        spans[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in spans))

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        self._begun = _now(optimizer)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        self._spans.append((self._begun, _now(optimizer)))


def _now(optimizer: Optimizer) -> Any:
    """Seconds on the host or, where the optimizer works on an accelerator, an event in its stream."""
    device = next(parameter.device for group in optimizer.param_groups for parameter in group["params"])
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event
