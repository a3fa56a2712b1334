"""What benchmark.py compares: each optimizer and how it is made, what it keeps, the model and the floor.

A peer is an optional package. It is imported when it is made, so that one that is missing can be named.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.layout import cut_blocks, matrix_shape

HEADS, CLASSES, IMAGE, PATCH = 6, 100, 32, 4  # of the ViT; image and patch: side in pixels
BLOCK = 1024  # Shampoo4's max_preconditioner_dim


class Steps(Protocol):
    """Whatever takes steps on the gradients of its parameters."""

    def step(self) -> object: ...


Make = Callable[[list[nn.Parameter], int], Steps]  # of parameters and the steps between two refreshes


@dataclass(frozen=True)
class Choice:
    """An optimizer of the benchmark.

    ``module`` and ``install``: what a peer is imported as, and the command that brings it; ours and torch's have none.
    ``compiles``: it calls torch.compile. ``slow_to_compile``: on a CPU that takes minutes. ``refreshes``: not all its
    steps are alike.
    """

    label: str
    make: Make
    module: str = ""
    distribution: str = ""
    install: str = "pip install '.[bench]'"
    compiles: bool = False
    slow_to_compile: bool = False
    refreshes: bool = True

    @property
    def is_peer(self) -> bool:
        return bool(self.module)

    def why_missing(self) -> str:
        """Why this peer cannot be imported; empty if it can be."""
        try:
            if self.module:
                importlib.import_module(self.module)
        except Exception as error:  # a package may fail at its import in its own way
            return first_line(error)
        return ""

    def version(self) -> str:
        """Of the peer's installed distribution; torch's for ours."""
        try:
            return importlib.metadata.version(self.distribution or "torch")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


class Together:
    """Optimizers of different parameters that step in turn."""

    def __init__(self, *optimizers: Steps) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _muon(parameters: list[nn.Parameter], interval: int) -> Steps:
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return Together(torch.optim.Muon(matrices), torch.optim.AdamW(others))


def _imported(module: str, name: str, **options: Any) -> Make:
    """A peer with fixed options; the value ``...`` stands for the interval."""

    def make(parameters: list[nn.Parameter], interval: int) -> Steps:
        given = {key: interval if value is ... else value for key, value in options.items()}
        optimizer: Steps = getattr(importlib.import_module(module), name)(parameters, **given)
        return optimizer

    return make


def _meta(parameters: list[nn.Parameter], interval: int) -> Steps:
    meta = importlib.import_module("distributed_shampoo")
    optimizer: Steps = meta.DistributedShampoo(
        parameters,
        lr=1e-3,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        max_preconditioner_dim=1024,
        precondition_frequency=interval,
        grafting_config=meta.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )
    return optimizer


def _ours(options: Callable[[], dict[str, Any]]) -> Make:
    """Shampoo4; its options are asked for when it is made."""

    def make(parameters: list[nn.Parameter], interval: int) -> Steps:
        intervals = {"statistics_interval": interval, "root_interval": interval}
        return Shampoo4(parameters, **{**options(), **intervals})

    return make


OURS = {
    "shampoo4-32bit": Choice("Shampoo4, 32 bits", _ours(lambda: {"bits": 32})),
    "shampoo4": Choice("Shampoo4, 4 bits", _ours(dict)),
    "shampoo4-naive": Choice("Shampoo4, naive", _ours(lambda: {"quantize": "preconditioner"})),
    "shampoo4-staggered": Choice("Shampoo4, staggered", _ours(lambda: {"refresh": "staggered"})),
    "shampoo4-implicit": Choice("Shampoo4, implicit roots", _ours(lambda: {"root": "implicit"})),
    "shampoo4-compact": Choice("Shampoo4, compact", _ours(lambda: Shampoo4.compact_settings())),
    "shampoo4-compiled": Choice("Shampoo4, compiled", _ours(lambda: {"compile": True}), compiles=True),
}
_KOZISTR: dict[str, Any] = {"module": "pytorch_optimizer", "distribution": "pytorch-optimizer"}
_BNB: dict[str, Any] = {"module": "bitsandbytes.optim", "distribution": "bitsandbytes", "refreshes": False}
_AO: dict[str, Any] = {
    "module": "torchao.optim", "distribution": "torchao", "compiles": True, "refreshes": False,
}  # fmt: skip
CHOICES = {
    "adamw": Choice("AdamW (torch)", lambda parameters, _: torch.optim.AdamW(parameters), refreshes=False),
    **OURS,
    "muon": Choice("Muon + AdamW (torch)", _muon, refreshes=False),
    "soap": Choice(
        "SOAP (pytorch_optimizer)", _imported("pytorch_optimizer", "SOAP", precondition_frequency=...), **_KOZISTR
    ),
    "shampoo": Choice(
        "Shampoo (pytorch_optimizer)",
        _imported("pytorch_optimizer", "Shampoo", preconditioning_compute_steps=...),
        **_KOZISTR,
    ),
    "scalable-shampoo": Choice(
        "ScalableShampoo (pytorch_optimizer)",
        _imported("pytorch_optimizer", "ScalableShampoo", preconditioning_compute_steps=...),
        **_KOZISTR,
    ),
    "heavyball-soap": Choice(
        "SOAP (heavyball)",
        _imported("heavyball", "SOAP", precondition_frequency=...),
        "heavyball",
        "heavyball",
        compiles=True,
        slow_to_compile=True,
    ),
    "meta-shampoo": Choice(
        "Shampoo (Meta's distributed_shampoo)",
        _meta,
        "distributed_shampoo",
        "torch-shampoo",
        "pip install git+https://github.com/facebookresearch/optimizers (needs Python 3.12)",
    ),
    "bitsandbytes-adamw8bit": Choice(
        "8-bit AdamW (bitsandbytes)", _imported("bitsandbytes.optim", "AdamW8bit"), **_BNB
    ),
    "torchao-adamw8bit": Choice("8-bit AdamW (torchao)", _imported("torchao.optim", "AdamW8bit"), **_AO),
    "torchao-adamw4bit": Choice("4-bit AdamW (torchao)", _imported("torchao.optim", "AdamW4bit"), **_AO),
}


def first_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


# -- the model ---------------------------------------------------------------------------------------------------------


def vit(hidden_size: int, layers: int) -> nn.Module:
    """The vision transformer whose parameters every optimizer gets; the same random weights each time."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=IMAGE, patch_size=PATCH, hidden_size=hidden_size, num_hidden_layers=layers,
        intermediate_size=4 * hidden_size, num_attention_heads=HEADS, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def random_batch(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and their labels."""
    return torch.randn(images, 3, IMAGE, IMAGE, device=device), torch.randint(CLASSES, (images,), device=device)


# -- the floor ---------------------------------------------------------------------------------------------------------


def block_shapes(parameters: Iterable[Tensor]) -> Counter[tuple[int, int]]:
    """How many blocks of each shape Shampoo4 cuts the parameters into."""
    matrices = [matrix for p in parameters if (matrix := matrix_shape(p.shape))]
    blocks = [block for matrix in matrices for block in cut_blocks(matrix, BLOCK, "even")]
    return Counter((block.rows, block.columns) for block in blocks)


class Products:
    """The products L G R of all blocks, with dense float32 factors, blocks of equal shape in one batch; nothing else.

    An ordinary step of Shampoo4 cannot do with less, as long as its roots are applied as matrices.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device
        self.batches = [
            tuple(torch.randn(count, *sides, device=device) for sides in ((m, m), (m, n), (n, n)))
            for (m, n), count in block_shapes(parameters).items()
        ]

    def step(self) -> None:
        for left, gradients, right in self.batches:
            torch.bmm(torch.bmm(left, gradients), right)


# -- what is kept ------------------------------------------------------------------------------------------------------

_EMPTY = (
    str, bytes, bool, int, float, complex, type(None), type, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.dtype, torch.device,
)  # fmt: skip


def state_bytes(holder: object, apart: Iterable[Tensor]) -> int:
    """Bytes under all tensors that ``holder`` keeps in containers and objects, however deep.

    Memory that tensors share is counted once, and that under ``apart``, the parameters and gradients, not at all.
    Tensor subclasses count by the tensors they are made of. What hides in closures is not seen.
    """
    others = {storage.data_ptr() for tensor in apart for storage in _storages(tensor)}
    kept = {storage.data_ptr(): storage.nbytes() for tensor in _tensors(holder) for storage in _storages(tensor)}
    return sum(size for address, size in kept.items() if address not in others)


def _tensors(holder: object) -> Iterator[Tensor]:
    seen: dict[int, object] = {}  # keeps them alive, so that no id comes twice
    waiting = [holder]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _EMPTY) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
            continue
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            waiting += item
        waiting += getattr(item, "__dict__", {}).values()
        slots = itertools.chain.from_iterable(_names(kind) for kind in type(item).__mro__)
        waiting += [getattr(item, name, None) for name in slots]


def _names(kind: type) -> tuple[str, ...]:
    """Slots of a class; private names as they are stored."""
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(
        f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names
    )


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor also has a mesh
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()
