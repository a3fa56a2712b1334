"""The tasks of the fair comparison: a vision transformer on Fashion-MNIST, a small Llama on Python's source code."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification
from vit.args import DataArguments
from vit.sources import load_image_data

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
Batch = tuple[Tensor, Tensor]  # inputs and labels
_CONTEXT = 128  # bytes that the language model sees
_HEAD = 32  # size of an attention head


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: on the command line.
        title: in tables and pictures.
        steps: of a whole run.
        weight_decay: decoupled, of all parameters.
        beta2: of AdamW, as is usual for such models.
        start: the learning rate at which a search begins.
        judged_by: key of the result that tells which learning rate is best; less is better.
        schedule: of the learning rate after the warm-up, from 1 to 0 as its argument goes from 0 to 1.
        hidden_size: of the model. Heads keep their size, and the feed-forward layers their share.
        make_model: of a seed and a hidden size.
        batches: an endless stream of training batches, of a seed.
        loss: of a model and a batch.
        evaluate: figures of a trained model.
    """

    name: str
    title: str
    steps: int
    weight_decay: float
    beta2: float
    start: float
    judged_by: str
    schedule: Callable[[float], float]
    hidden_size: int
    make_model: Callable[[int, int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]


# -- a vision transformer ----------------------------------------------------------------------------------------------


@cache
def _images() -> tuple[Batch, Batch]:
    """All 60,000 training and 10,000 test images, normalized, with their labels."""
    data = load_image_data(DataArguments(dataset_name="fashion-mnist"))
    pairs = []
    for rows in (data.train, data.validation):
        columns = rows.with_format("numpy")
        pixels = torch.from_numpy(np.asarray(columns["image"][:])).float().div(255).unsqueeze(1)
        pairs.append((pixels.sub(0.2860).div(0.3530), torch.from_numpy(np.asarray(columns["label"][:])).long()))
    return pairs[0], pairs[1]


def _make_vit(seed: int, hidden: int) -> nn.Module:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=hidden, num_hidden_layers=4,
        num_attention_heads=hidden // _HEAD, intermediate_size=2 * hidden, hidden_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _image_batches(seed: int) -> Iterator[Batch]:
    (pixels, labels), _ = _images()
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(128)[: len(labels) // 128]:
            yield pixels[chosen].to(DEVICE), labels[chosen].to(DEVICE)


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])


def _evaluate_images(model: nn.Module) -> dict[str, float]:
    _, (pixels, labels) = _images()
    logits = torch.cat([model(pixel_values=part.to(DEVICE)).logits.cpu() for part in pixels.split(500)])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"test accuracy": accuracy, "test loss": F.cross_entropy(logits, labels).item()}


# -- a language model --------------------------------------------------------------------------------------------------


@cache
def _texts() -> tuple[Tensor, Tensor]:
    """The sources of Python's standard library as bytes: every twentieth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 20 == 7].append(path.read_bytes())
    train, validation = (np.frombuffer(b"\n".join(own), dtype=np.uint8) for own in parts)
    return torch.from_numpy(train.copy()), torch.from_numpy(validation.copy())


def _make_llama(seed: int, hidden: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=4,
        num_attention_heads=hidden // _HEAD, max_position_embeddings=_CONTEXT, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _text_batches(seed: int) -> Iterator[Batch]:
    train, _ = _texts()
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _cut(train, torch.randint(len(train) - _CONTEXT, (8,), generator=generator))


def _cut(text: Tensor, starts: Tensor) -> Batch:
    rows = torch.stack([text[start : start + _CONTEXT + 1] for start in starts.tolist()]).to(DEVICE).long()
    return rows[:, :-1], rows[:, 1:]


def _text_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten())


def _evaluate_text(model: nn.Module) -> dict[str, float]:
    _, text = _texts()
    starts = torch.linspace(0, len(text) - _CONTEXT - 2, 512).long()
    losses = [_text_loss(model, _cut(text, part)).item() for part in starts.split(32)]
    return {"validation loss": sum(losses) / len(losses)}


TASKS = {
    task.name: task
    for task in (
        Task(
            "vit", "ViT of 0.54 M parameters on Fashion-MNIST, 4 epochs", 4 * 468, 0.05, 0.999, 1e-3, "training loss",
            lambda done: (1 + math.cos(math.pi * done)) / 2, 128, _make_vit, _image_batches, _image_loss,
            _evaluate_images,
        ),
        Task(
            "gpt", "Llama of 1.8 M parameters on Python's standard library, 1,500 steps", 1500, 0.1, 0.95, 4e-3,
            "validation loss", lambda done: 1 - done, 192, _make_llama, _text_batches, _text_loss, _evaluate_text,
        ),
    )
}  # fmt: skip
