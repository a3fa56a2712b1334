"""Who steps on what: matrices of method="soap" go along their directions, all else is the base optimizer's.

Where a param group holds parameters, each of them is one or the other. A flat tensor of ZeRO has parts of both: the
base then steps on a vector of its own parts, and keeps states for these only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .held import HeldParameter
from .placement import local_tensor, local_tensors


class Updates:
    """How the tensors in the param groups are shared between soap's steps and the base optimizer's.

    Args:
        entries: all parameters that a step is about.
    """

    def __init__(self, entries: Sequence[HeldParameter]) -> None:
        self._entries = entries  # keeps the holders, and so their ids
        # By the id of a holder with a soap matrix, where these lie in it, and where the base's parameters do. Tensors
        # take several times as long to hash, and a step looks hundreds of them up.
        self._along: dict[int, list[slice]] = {}
        self._left: dict[int, list[slice]] = {}
        self._in_states: dict[str, slice] = {}  # by name, where a parameter lies in the vectors of the base's states
        holders = {id(entry.holder) for entry in entries if entry.is_soap}
        self._whole = {  # holders that are nothing else than one soap matrix
            id(entry.holder)
            for entry in entries
            if entry.is_soap and entry.in_holder == slice(0, local_tensor(entry.holder).numel())
        }
        for entry in entries:
            if id(entry.holder) not in holders or not entry.trained:
                continue
            parts = (self._along if entry.is_soap else self._left).setdefault(id(entry.holder), [])
            if not entry.is_soap:
                start = sum(part.stop - part.start for part in parts)
                self._in_states[entry.name] = slice(start, start + entry.shard.length)
            if entry.shard.length:
                parts.append(entry.in_holder)

    def step_along(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take soap's steps: W <- (1 - lr weight_decay) W - lr direction; directions stand in the gradients.

        The weight decay is decoupled, as AdamW's, whatever the base's is.
        """
        for group in groups:
            along = [p for p in group["params"] if self._along.get(id(p)) and p.grad is not None]
            if along:
                weights = self._along_of(along, along)
                directions = self._along_of(along, [holder.grad for holder in along])
                _step_along(weights, directions, group["lr"], group.get("weight_decay", 0.0))

    def _along_of(self, holders: Sequence[Tensor], tensors: Sequence[Any]) -> list[Tensor]:
        """What goes along its direction of ``tensors``, which are ``holders`` or their gradients."""
        found = []
        for holder, tensor in zip(holders, local_tensors(tensors), strict=True):
            if id(holder) in self._whole:
                found.append(tensor)
            else:
                found += [tensor.view(-1)[part] for part in self._along[id(holder)]]
        return found

    @contextlib.contextmanager
    def left_to_base(self, groups: Sequence[dict[str, Any]], states: MutableMapping[Tensor, Any]) -> Iterator[None]:
        """Leave in ``groups`` only what the base steps on, with its ``states``; put everything back at the end."""
        if not self._along:
            yield
            return
        standing = [group["params"] for group in groups]
        gathered: dict[Tensor, Tensor] = {}  # the base's vector, by its holder
        try:
            for group in groups:
                group["params"] = self._shares(group["params"], gathered)
            for holder, vector in gathered.items():
                if states.get(holder):
                    states[vector] = states.pop(holder)
            yield
        finally:
            for group, params in zip(groups, standing, strict=True):
                group["params"] = params
            for holder, vector in gathered.items():
                if vector in states:
                    states[holder] = states.pop(vector)
                parts = self._left[id(holder)]
                lengths = [part.stop - part.start for part in parts]
                for part, values in zip(parts, vector.detach().split(lengths), strict=True):
                    holder.detach()[part].copy_(values)

    def _shares(self, holders: Sequence[Tensor], gathered: dict[Tensor, Tensor]) -> list[Tensor]:
        """What the base steps on: the tensors themselves, or vectors of its parts of them, which ``gathered`` gets."""
        shares = []
        for holder in holders:
            if id(holder) not in self._along:
                shares.append(holder)
            elif parts := self._left.get(id(holder)):
                gathered[holder] = _vector(holder, parts)
                shares.append(gathered[holder])
        return shares

    # -- where the base's states are -----------------------------------------------------------------------------------

    def in_states(self, entry: HeldParameter) -> slice | None:
        """Return where a parameter's elements are in the base's flattened states; None if it keeps none."""
        if entry.is_soap:
            return None
        own = self._in_states.get(entry.name)
        return entry.in_holder if own is None else own

    def state_like(self, holder: Tensor) -> Tensor:
        """Return what has the shape of the base's states of ``holder``: itself, or a vector of the base's parts."""
        if id(holder) not in self._along:
            return holder
        return holder.detach().new_empty(sum(part.stop - part.start for part in self._left.get(id(holder), ())))


def _vector(holder: Tensor, parts: Sequence[slice]) -> Tensor:
    """The ``parts`` of a flat tensor as a parameter of its own, and those of its gradient."""
    vector = torch.nn.Parameter(torch.cat([holder.detach()[part] for part in parts]))
    if holder.grad is not None:
        vector.grad = torch.cat([holder.grad[part] for part in parts])
    return vector


def _step_along(weights: list[Tensor], directions: list[Tensor], lr: Any, weight_decay: Any) -> None:
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    decay = 1 - lr * weight_decay
    exact = []
    for weight, direction in zip(weights, directions, strict=True):
        if weight.dtype not in (torch.float32, torch.float64):  # rounded once
            weight.copy_(weight.to(torch.float32).mul_(decay).sub_(direction.to(torch.float32).mul_(lr)))
        elif isinstance(lr, Tensor):
            weight.mul_(decay).addcmul_(direction, -lr)
        else:
            exact.append((weight, direction))
    if exact:
        weights, directions = map(list, zip(*exact, strict=True))
        if weight_decay:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, directions, alpha=-lr)
