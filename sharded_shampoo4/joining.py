"""Steps that every rank must take: uneven inputs, as torch's Join context meets them, and errors around a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .session import Session

if dist.is_available():
    from torch.distributed.algorithms.join import Join
    from torch.distributed.algorithms.join import Joinable as Joinable
    from torch.distributed.algorithms.join import JoinHook as JoinHook

    def notify(joinable: Joinable) -> None:
        """Tell a Join context, if there is one, that this rank has not run out of inputs."""
        Join.notify_join_context(joinable)
else:  # torch without torch.distributed
    Joinable = JoinHook = object  # type: ignore[assignment,misc]

    def notify(joinable: Joinable) -> None:
        pass


class SteppingTogether(Optimizer, Joinable):
    """An optimizer whose ranks step together, with a process group to choose, and its ``Session``."""

    _session: Session
    _process_group: Any

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``step`` as torch does, with its hooks; ranks that wait are told why this one has left it."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: SteppingTogether, *arguments: Any, **options: Any) -> Any:
            with self._session.leaving_word(self.param_groups):
                return hooked(self, *arguments, **options)

        return step

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return what ``torch.distributed.algorithms.Join`` calls: if a rank runs out of inputs, every rank raises."""
        return Refusal(self)

    @property
    def join_device(self) -> torch.device:
        """Where Join's messages are made."""
        parameter: Tensor = next(parameter for group in self.param_groups for parameter in group["params"])
        return parameter.device

    @property
    def join_process_group(self) -> Any:
        """The ranks that step together."""
        return self._session.process_group(self.param_groups) or dist.group.WORLD


class Refusal(JoinHook):  # type: ignore[misc,unused-ignore]
    """Raises on every rank when one of them has run out of inputs: its gradients are missing then."""

    def __init__(self, optimizer: SteppingTogether) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """Take the place of a step that the other ranks make."""
        optimizer = self._optimizer
        if optimizer._process_group == "alone":
            return
        error = RuntimeError(
            "this rank has run out of inputs while others have not, and Shampoo4 needs every rank in every step: use "
            "Join([model, optimizer], throw_on_early_termination=True), which ends the epoch on all ranks, or a loader "
            "with drop_last=True"
        )
        optimizer._session.current(optimizer.param_groups, optimizer.state, optimizer, error)
