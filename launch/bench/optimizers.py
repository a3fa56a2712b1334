"""The optimizers that benchmark.py compares, the model whose gradients they get, and the floor of a step.

A peer is an optional package. It is imported when it is made, so that one that is missing can be named.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from sharded_shampoo4 import Shampoo4

from .blocks import BLOCK, SOAP_BLOCK, blocks_of

HEADS, CLASSES, IMAGE, PATCH = 6, 100, 32, 4  # of the ViT; image and patch: side in pixels


class Steps(Protocol):
    """Whatever takes steps on the gradients of its parameters."""

    def step(self) -> object: ...


Make = Callable[[list[nn.Parameter], int], Steps]  # of parameters and the steps between two refreshes


@dataclass(frozen=True)
class Choice:
    """An optimizer of the benchmark.

    Attributes:
        label: its name in tables.
        make: makes it of parameters and the steps between two refreshes.
        module: what a peer is imported as; empty for ours and torch's.
        install: the command that installs a peer.
        compiles: whether it calls torch.compile.
        slow_to_compile: whether that takes minutes on a CPU.
        refreshes: whether some of its steps do more than others.
        floor: of ours, the name in FLOORS of the products that an ordinary step cannot do without.
    """

    label: str
    make: Make
    module: str = ""
    install: str = "pip install '.[bench]'"
    compiles: bool = False
    slow_to_compile: bool = False
    refreshes: bool = True
    floor: str = ""

    @property
    def is_peer(self) -> bool:
        return bool(self.module)

    def why_missing(self) -> str:
        """Return the error of importing this peer; an empty string if it can be imported."""
        try:
            if self.module:
                importlib.import_module(self.module)
        except Exception as error:  # a package may fail at its import in its own way
            return first_line(error)
        return ""

    def version(self) -> str:
        """Return the version of the peer's package, torch's for ours, or "unknown"."""
        names = importlib.metadata.packages_distributions().get(self.module.partition(".")[0] or "torch")
        return importlib.metadata.version(names[0]) if names else "unknown"


class MuonWithAdamW:
    """torch's Muon for matrices, AdamW for other parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.muon = torch.optim.Muon([p for p in parameters if p.ndim == 2])
        self.adamw = torch.optim.AdamW([p for p in parameters if p.ndim != 2])

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


def _ours(**options: Any) -> Make:
    def make(parameters: list[nn.Parameter], interval: int) -> Steps:
        return Shampoo4(parameters, **options, statistics_interval=interval, interval_warmup=False)

    return make


def _paper(**options: Any) -> Make:
    def make(parameters: list[nn.Parameter], interval: int) -> Steps:
        intervals = {"statistics_interval": interval, "root_interval": interval}
        return Shampoo4(parameters, method="shampoo", **options, **intervals)

    return make


def _imported(module: str, name: str, **options: Any) -> Make:
    """Return a function that makes a peer. An option with the value ``...`` becomes the interval."""

    def make(parameters: list[nn.Parameter], interval: int) -> Steps:
        given = {key: interval if value is ... else value for key, value in options.items()}
        optimizer: Steps = getattr(importlib.import_module(module), name)(parameters, **given)
        return optimizer

    return make


def _meta(parameters: list[nn.Parameter], interval: int) -> Steps:
    meta = importlib.import_module("distributed_shampoo")
    grafting = meta.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-12, "max_preconditioner_dim": 1024}
    optimizer: Steps = meta.DistributedShampoo(
        parameters, precondition_frequency=interval, grafting_config=grafting, **options
    )
    return optimizer


def shampoo4_with_blocks(limit: int) -> Choice:
    """Return Shampoo4 with blocks of at most ``limit`` rows and columns."""
    return Choice("Shampoo4", _ours(max_preconditioner_dim=limit))


ADAMW = Choice("AdamW (torch)", lambda parameters, _: torch.optim.AdamW(parameters, lr=1e-3), refreshes=False)
OURS = {
    "shampoo4": Choice("Shampoo4", _ours(), floor="rotations"),
    "shampoo4-compact": Choice("Shampoo4, compact", _ours(preset="compact"), floor="rotations"),
    "shampoo4-staggered": Choice("Shampoo4, staggered", _ours(refresh="staggered"), floor="rotations"),
    "shampoo4-32bit": Choice("Shampoo, 32 bits", _paper(bits=32), floor="products"),
    "shampoo4-paper": Choice("Shampoo, 4 bits", _paper(), floor="products"),
    "shampoo4-naive": Choice("Shampoo, 4 bits, naive", _paper(quantize="preconditioner"), floor="products"),
    "shampoo4-implicit": Choice("Shampoo, 4 bits, implicit roots", _paper(root="implicit"), floor="products"),
}


def _pytorch_optimizer(name: str, interval: str) -> Choice:
    make = _imported("pytorch_optimizer", name, **{interval: ...})
    return Choice(f"{name} (pytorch_optimizer)", make, "pytorch_optimizer")


def _torchao(bits: int) -> Choice:
    make = _imported("torchao.optim", f"AdamW{bits}bit")
    return Choice(f"{bits}-bit AdamW (torchao)", make, "torchao.optim", compiles=True, refreshes=False)


CHOICES = {
    "adamw": ADAMW,
    **OURS,
    "muon": Choice("Muon + AdamW (torch)", lambda parameters, _: MuonWithAdamW(parameters), refreshes=False),
    "soap": _pytorch_optimizer("SOAP", "precondition_frequency"),
    "shampoo": _pytorch_optimizer("Shampoo", "preconditioning_compute_steps"),
    "scalable-shampoo": _pytorch_optimizer("ScalableShampoo", "preconditioning_compute_steps"),
    "heavyball-soap": Choice(
        "SOAP (heavyball)", _imported("heavyball", "SOAP", precondition_frequency=...), "heavyball",
        compiles=True, slow_to_compile=True,
    ),
    "meta-shampoo": Choice(
        "Shampoo (Meta's distributed_shampoo)", _meta, "distributed_shampoo",
        "pip install git+https://github.com/facebookresearch/optimizers (needs Python 3.12)",
    ),
    "bitsandbytes-adamw8bit": Choice(
        "8-bit AdamW (bitsandbytes)", _imported("bitsandbytes.optim", "AdamW8bit"), "bitsandbytes.optim",
        refreshes=False,
    ),
    "torchao-adamw8bit": _torchao(8),
    "torchao-adamw4bit": _torchao(4),
}  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def is_ordinary(name: str, step: int, interval: int) -> bool:
    """Tell whether a step of ours, counted from 1, has nothing due. Steps of the staggered mode are all alike."""
    return name == "shampoo4-staggered" or step % interval != 0


def vit(hidden_size: int, layers: int) -> nn.Module:
    """Make the vision transformer of the benchmark, with the same random weights each time."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=IMAGE, patch_size=PATCH, hidden_size=hidden_size, num_hidden_layers=layers,
        intermediate_size=4 * hidden_size, num_attention_heads=HEADS, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def random_batch(images: int, device: torch.device) -> dict[str, Tensor]:
    """Make random images and labels, as arguments of the model."""
    pixels = torch.randn(images, 3, IMAGE, IMAGE, device=device)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (images,), device=device)}


class Products:
    """The products L G R of all blocks, with dense float32 matrices, blocks of equal shape in one batch.

    Args:
        parameters: whose blocks are multiplied.
        limit: most rows or columns of a block.
        times: how often every block is multiplied from both sides.
    """

    def __init__(self, parameters: Sequence[Tensor], limit: int = BLOCK, times: int = 1) -> None:
        device, self.times = parameters[0].device, times
        self.batches = []
        for block, count in blocks_of((p.shape for p in parameters), limit).items():
            factors = [torch.randn(count, order, order, device=device) if order else None for order in block.orders]
            self.batches.append((torch.randn(count, block.rows, block.columns, device=device), *factors))

    def step(self) -> None:
        for gradients, left, right in self.batches:
            for _ in range(self.times):
                found = gradients if left is None else torch.bmm(left, gradients)
                if right is not None:
                    torch.bmm(found, right)


# The products that an ordinary step of ours must make. A floor is the time of these and of AdamW's step.
FLOORS = {
    "products": Choice("products L G R alone", lambda parameters, _: Products(parameters), refreshes=False),
    "rotations": Choice(
        "products V^T G V and back alone", lambda parameters, _: Products(parameters, SOAP_BLOCK, 2), refreshes=False
    ),
}
