"""A model with an optimizer under any host, trained on replayed gradients, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_shampoo4 import checkpoint

from . import worlds as hosts
from . import zero_worlds as zero
from .contract import make_optimizer

KIND = "mlp"
OPTIONS: dict[str, Any] = {"method": "shampoo", "max_preconditioner_dim": 30, "min_quant_numel": 0}
FIRST, THEN = range(5), range(5, 10)
ALL = (*hosts.HOSTS, *zero.HOSTS)


class Training:
    """A model with an optimizer under a host, and gradients to replay."""

    def __init__(self, host: str, seed: int = 0, kind: str = KIND, **options: Any) -> None:
        self.host, self.kind = host, kind
        model = hosts.make_model(kind, seed)
        if kind == "vit":
            model.unused.requires_grad_(False)  # some hosts give it zero gradients, others none
        model.register_buffer("seen", torch.tensor([7.0, 8.0]) + seed)
        model.register_buffer("passing", torch.tensor(0.5 + seed), persistent=False)
        self._start(model, options)

    def _start(self, model: Any, options: dict[str, Any]) -> None:
        """Wrap the model, and make its optimizer."""
        host = self.host
        if host.startswith("zero"):
            self.optimizer = make_optimizer(model, "none", {**OPTIONS, **options})
            self.model = zero.start(zero.Replay(model), zero.configuration(host), self.optimizer)
        else:
            self.model = hosts.wrap(model, host)
            self.optimizer = make_optimizer(self.model, host, {**OPTIONS, **options})

    @property
    def handle(self) -> Any:
        """What is given to save and load."""
        return self.model if self.host.startswith("zero") else self.optimizer

    def save(self, folder: str | Path) -> None:
        checkpoint.save(self.handle, folder, model=self.model)

    def load(self, folder: str | Path) -> None:
        checkpoint.load(self.handle, folder, model=self.model)

    def train(self, steps: range) -> dict[str, Tensor]:
        for step in steps:
            gradients = self.gradients(step)
            if self.host.startswith("zero"):
                zero.step(self.model, gradients)
            else:
                hosts.set_gradients(self.model, self.host, gradients)
                self.optimizer.step()
        return self.parameters()

    def gradients(self, step: int) -> dict[str, Tensor | None]:
        """Those to replay, by names."""
        return hosts.make_gradients(self.kind, step)

    def parameters(self) -> dict[str, Tensor]:
        """The whole model's, frozen ones too, and its buffer."""
        by_zero = self.host.startswith("zero")
        full = zero.full_parameters(self.model) if by_zero else hosts.full_parameters(self.model, self.host)
        buffers = dict(self.model.named_buffers())
        return {**full, "seen": next(buffer.clone() for name, buffer in buffers.items() if name.endswith("seen"))}

    def end(self) -> None:
        if self.host.startswith("zero"):
            self.model.destroy()
