"""Which of a portable checkpoint's values and states go where: what was trained may be frozen now, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..report import shorten
from .untrained import Untrained
from .vectors import UNTRAINED, VALUES, key

Match = Callable[[Iterable[str], Iterable[str]], dict[str, str]]  # names here by names in the checkpoint


@dataclass
class Fit:
    """What goes where. All names but those in ``trained`` and ``thawed`` values and in keys are those here."""

    trained: dict[str, str] = field(default_factory=dict)  # what was trained and is: its name in the checkpoint
    thawed: dict[str, str] = field(default_factory=dict)  # what is trained, but was not: the key of its values
    values: list[tuple[Untrained, str]] = field(default_factory=list)  # what is not trained: the key of its values
    frozen: list[str] = field(default_factory=list)  # those among ``values`` that were trained
    left: list[str] = field(default_factory=list)  # frozen parameters that the checkpoint leaves out

    def remarks(self) -> list[str]:
        """What a user should know, in words."""
        found = []
        if self.thawed:
            found.append(
                f"{shorten(self.thawed)} were not trained when the checkpoint was saved: their values are loaded, "
                "their states begin anew"
            )
        if self.frozen:
            found.append(
                f"{shorten(self.frozen)} were trained when the checkpoint was saved and are frozen now: their values "
                "are loaded, nothing is kept of their states"
            )
        if self.left:
            found.append(
                f"{shorten(self.left)} are left as they are: the checkpoint was saved with frozen=False, without "
                "frozen parameters"
            )
        return found


def fit(
    manifest: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    others: Sequence[Untrained],
    match: Match,
    with_model: bool,
    frozen: bool,
) -> Fit:
    """Find out what of ``manifest`` goes where.

    Args:
        manifest: of the checkpoint; its names are plain.
        shapes: of what is trained here, by plain names.
        others: what is here, but not trained; without a model, only what stands in the optimizer's groups.
        match: finds names in the checkpoint among those here.
        with_model: whether ``others`` is all that the model has.
        frozen: whether parameters that were not trained and are not are read at all.

    Raises:
        ValueError: something is missing on either side, or has another shape.
    """
    saved, beside = manifest["parameters"], manifest.get("untrained", {})
    still = {other.name: other for other in others}
    names, names_beside = match(saved, [*shapes, *still]), match(beside, [*shapes, *still])
    twice = sorted(set(names.values()) & set(names_beside.values()))
    if twice:
        raise ValueError(
            f"{shorten(twice)} is in the checkpoint twice, once trained and once not: its names are ambiguous"
        )
    found = Fit()
    for name, here in names.items():
        if here in shapes:
            found.trained[here] = name
        else:
            found.values.append((still[here], key(VALUES, name)))
            found.frozen.append(here)
    for name, here in names_beside.items():
        if here in shapes:
            found.thawed[here] = key(UNTRAINED, name)
        elif with_model and (frozen or not still[here].frozen):
            found.values.append((still[here], key(UNTRAINED, name)))
    everywhere = {**shapes, **{name: other.shape for name, other in still.items()}}
    for entries, of in ((saved, names), (beside, names_beside)):
        _check_shapes({of[name]: entry["shape"] for name, entry in entries.items() if name in of}, everywhere, still)
    left_out = not manifest.get("frozen", True)
    _check_trained(saved, names, shapes, found, with_model, left_out)
    if with_model:
        read = {other.name for other, _ in found.values}
        unread = [other for other in others if other.name not in read and (frozen or not other.frozen)]
        found.left = [other.name for other in unread if left_out and other.frozen]
        _raise_if(
            "the checkpoint has no frozen parameter or buffer {}: was it saved without model=?",
            [other.name for other in unread if other.name not in found.left],
        )
        unknown = [n for n in beside if n not in names_beside and (frozen or not beside[n].get("frozen"))]
        _raise_if("there is no frozen parameter or buffer {} here", unknown)
    return found


def _check_trained(
    saved: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    found: Fit,
    with_model: bool,
    left_out: bool,
) -> None:
    hint = ": frozen parameters were left out of it (frozen=False)" if left_out else ""
    missing = [name for name in shapes if name not in found.trained and name not in found.thawed]
    _raise_if(f"the checkpoint has no {{}}{hint}", missing)
    hint = "" if with_model else ": if it is frozen here, give model="
    _raise_if(f"there is no {{}} here{hint}", [name for name in saved if name not in names])


def _check_shapes(
    saved: Mapping[str, Sequence[int]], here: Mapping[str, torch.Size], still: Mapping[str, Untrained]
) -> None:
    for name, shape in saved.items():
        if list(here[name]) != list(shape):
            where = f"{name} (not trained)" if name in still else name
            raise ValueError(f"{where} has shape {list(shape)} in the checkpoint and {list(here[name])} here")


def _raise_if(message: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise ValueError(message.format(shorten(names)))
