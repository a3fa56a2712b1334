"""The largest vision transformer whose weights, gradients and optimizer states fit on some GPUs under FSDP2.

The family that is searched: every published ViT from S to 22B, and between two neighbours the larger one with fewer
layers, down to the first that has more parameters than the smaller one. Above ViT-22B, the same with up to four times
its layers. Activations are not counted; they need room of their own.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

from memory_models import LADDER, SIZES, parameter_count, shapes_of, title
from memory_rules import Layout, Planner

_DEEPEST = 4  # times the layers of the largest published one


@dataclass(frozen=True)
class Answer:
    """A ViT of the family, and the largest published one (None: not even the smallest)."""

    name: str
    layers: int
    parameters: int
    total: int  # bytes on the fullest rank
    published: str | None

    @property
    def open_ended(self) -> bool:
        """Whether the family ends here: a larger one might fit too."""
        return self.name == LADDER[-1] and self.layers == depths(self.name)[-1]

    def __str__(self) -> str:
        text, whole = title(self.name), published_depth(self.name)
        if self.layers < whole:
            text += f", {self.layers} of its {whole} layers"
        elif self.layers > whole:
            text += f", {self.layers} layers instead of {whole}"
        return f"{text}, or larger" if self.open_ended else text


def published_depth(name: str) -> int:
    """Layers of a published ViT."""
    return int(SIZES[name]["num_hidden_layers"])


@functools.cache
def depths(name: str) -> range:
    """The numbers of layers with which a ViT stands in the family, fewest first."""
    index, whole = LADDER.index(name), published_depth(name)
    last = _DEEPEST * whole if name == LADDER[-1] else whole
    if index == 0:
        return range(1, last + 1)
    smaller = parameter_count(shapes_of(LADDER[index - 1]))
    one, two = (parameter_count(shapes_of(name, layers)) for layers in (1, 2))
    return range(max(1, 1 + (smaller - one) // (two - one) + 1), last + 1)


@functools.lru_cache(maxsize=256)
def _planner(name: str, layers: int) -> Planner:
    return Planner(shapes_of(name, layers))


def total_bytes(name: str, layers: int, optimizer: str, gpus: int) -> int:
    """Bytes on the fullest of ``gpus`` ranks."""
    return _planner(name, layers).footprint(Layout("fsdp2", gpus), [optimizer]).total(optimizer)


def largest(optimizer: str, gpus: int, room: float) -> Answer | None:
    """The member of the family with most parameters that needs at most ``room`` bytes on each of ``gpus`` GPUs."""

    def needed(name: str, layers: int) -> int:
        return total_bytes(name, layers, optimizer, gpus)

    for name in reversed(LADDER):
        choices = depths(name)
        if needed(name, choices[0]) > room:
            continue
        layers = choices[bisect.bisect_right(choices, room, key=functools.partial(needed, name)) - 1]
        published = (other for other in reversed(LADDER) if needed(other, published_depth(other)) <= room)
        count = parameter_count(_planner(name, layers).shapes)
        return Answer(name, layers, count, needed(name, layers), next(published, None))
    return None
