"""The optimizers of the fair comparison, with their usual settings."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.tensors import tensor_bytes

from .tasks import DEVICE, Task

Make = Callable[[nn.Module, Task], Sequence[Optimizer]]


@dataclass(frozen=True)
class Rival:
    """An optimizer: its name in tables, and what makes it, or several that share the parameters."""

    label: str
    make: Make
    multiple: float = 1.0  # of the learning rate at which a search begins
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # each step


def _adamw(model: nn.Module, task: Task) -> list[Optimizer]:
    return [AdamW(model.parameters(), betas=(0.9, task.beta2), weight_decay=task.weight_decay)]


def _muon(model: nn.Module, task: Task) -> list[Optimizer]:
    """Muon for matrices of hidden layers, with AdamW's update size; AdamW for all else."""
    named = dict(model.named_parameters())
    hidden = [parameter for name, parameter in named.items() if parameter.ndim == 2 and _is_hidden(name)]
    others = [parameter for name, parameter in named.items() if not (parameter.ndim == 2 and _is_hidden(name))]
    return [
        torch.optim.Muon(hidden, weight_decay=task.weight_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, betas=(0.9, task.beta2), weight_decay=task.weight_decay),
    ]


@contextlib.contextmanager
def _newton_schulz_in_float32() -> Iterator[None]:
    """Compute Muon's iteration in float32 on a CPU: bfloat16 takes about 20 times as long on most of them."""
    if DEVICE.type != "cpu":
        yield
        return
    with mock.patch.object(Tensor, "bfloat16", lambda tensor, **_: tensor.float()):
        yield


def _soap(interval: int) -> Make:
    """SOAP with eigenbases that are renewed every ``interval`` steps."""

    def make(model: nn.Module, task: Task) -> list[Optimizer]:
        made = importlib.import_module("pytorch_optimizer").SOAP
        options = {"betas": (0.95, 0.95), "weight_decay": task.weight_decay, "precondition_frequency": interval}
        return [made(model.parameters(), **options)]

    return make


def _is_hidden(name: str) -> bool:
    """Whether this is a layer between embeddings and heads, as far as its name tells."""
    return not any(word in name for word in ("embed", "classifier", "lm_head"))


def _ours(hidden_only: bool = False, **options: Any) -> Make:
    """Shampoo4 for all matrices, or for those of hidden layers, as Muon."""

    def make(model: nn.Module, task: Task) -> list[Optimizer]:
        base = {"betas": (0.9, task.beta2), "weight_decay": task.weight_decay, "total_steps": task.steps}
        named = list(model.named_parameters())
        left = [(name, parameter) for name, parameter in named if hidden_only and not _is_hidden(name)]
        taken = [(name, parameter) for name, parameter in named if not hidden_only or _is_hidden(name)]
        groups: list[dict[str, Any]] = [{"params": taken}]
        if left:
            groups.append({"params": left, "precondition": False})
        return [Shampoo4(groups, **base, **options)]

    return make


_LIKE_MUON: dict[str, Any] = {"newton_schulz_steps": 3, "soap_betas": (0.95, 0.95), "statistics_interval": 10}
RIVALS = {
    "adamw": Rival("AdamW", _adamw),
    "muon": Rival("Muon", _muon, 2, _newton_schulz_in_float32),
    "soap": Rival("SOAP, float32 (pytorch_optimizer)", _soap(10), 2),
    "soap-5": Rival("SOAP, new bases every 5 steps", _soap(5), 2),
    "shampoo4-paper": Rival("Shampoo4, the paper's rule", _ours(method="shampoo")),
    "shampoo4": Rival("Shampoo4", _ours(), 2),
    "shampoo4-compact": Rival("Shampoo4, compact", _ours(preset="compact"), 2),
    "shampoo4-muon": Rival("Shampoo4, 3 Newton-Schulz steps, hidden layers", _ours(True, **_LIKE_MUON), 4),
}


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Return the bytes of all states."""
    ours = (sum(made.state_bytes().values()) for made in optimizers if isinstance(made, Shampoo4))
    others = (state for made in optimizers if not isinstance(made, Shampoo4) for state in made.state.values())
    return sum(ours) + tensor_bytes(others)
