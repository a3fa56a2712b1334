"""Puts what a portable checkpoint stores in place: checked first, read into new tensors, then swapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..held import HeldParameter
from ..names import match_names, plain_names
from ..numerics.preconditioner import fresh_block
from ..options import PreconditionerOptions
from ..packing import refuse_former_levels, shaping_difference
from ..placement import is_dtensor, local_tensor
from ..planning.blocks import Block
from ..report import warn
from ..state_dict import VERSION_KEY
from ..tensors import is_low_bit
from .contents import block_bytes, interval
from .fit import Fit, fit
from .subject import Subject
from .vectors import VALUES, block_key, key


def with_plain_names(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a manifest whose names are plain, and the names in its files, by those that are not the same there.

    Early versions stored names with what wrappers put into them.

    Raises:
        ValueError: two names become equal.
    """
    if manifest.get("plain_names"):
        return manifest, {}
    saved = manifest["parameters"]
    names = dict(zip(plain_names(list(saved)), saved, strict=True))
    return {**manifest, "parameters": {plain: saved[name] for plain, name in names.items()}}, names


def check(manifest: Mapping[str, Any], subject: Subject) -> Fit:
    """Find out what of the checkpoint goes where.

    Raises:
        ValueError: with both values, if what ``manifest`` describes does not fit the optimizer.
    """
    base = subject.optimizer.base
    if manifest["base"] != base.name:
        raise ValueError(f"the checkpoint is of base optimizer {manifest['base']}, this one has {base.name}")
    saved: Mapping[str, Any] = manifest["parameters"]
    entries = subject.trained
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = fit(manifest, shapes, subject.untrained, match_names, subject.model is not None, subject.frozen)
    for here, name in found.trained.items():
        entry = entries[here]
        if saved[name]["base"]:
            held = torch.Size([local_tensor(subject.updates.state_like(entry.holder)).numel()])
            base.refuse_unportable(here, subject.imagined_states(entry), held)
        options = PreconditionerOptions.of_group(saved[name]["options"])
        refuse_former_levels(manifest["format"], options, f"{here} in the checkpoint")
        difference = shaping_difference(options, entry.options, [(here, entry.shape)])
        if difference:
            raise ValueError(f"{here} in the checkpoint has {difference}")
    for here, matrix in subject.matrices():
        if here in found.trained:
            blocks = block_bytes(matrix)
            there = saved[found.trained[here]].get("factors", {}).get("blocks")
            if there != blocks:
                raise ValueError(f"{here} has factors {_words(there)} in the checkpoint and {_words(blocks)} here")
    return found


def _words(blocks: Mapping[str, int] | None) -> str:
    return f"{len(blocks)} blocks of {sum(blocks.values())} bytes" if blocks else "no blocks"


class Restoration:
    """New tensors to read a checkpoint into, which replace the optimizer's once all of them are there.

    Args:
        manifest: of the checkpoint; its names are plain.
        subject: the optimizer.
        found: what goes where.
        in_files: names in the files, where they are not those in the manifest.

    Attributes:
        tensors: what is to be read, by keys.
    """

    def __init__(self, manifest: Mapping[str, Any], subject: Subject, found: Fit, in_files: Mapping[str, str]) -> None:
        self._manifest, self._subject, self._fit, self._in_files = manifest, subject, found, in_files
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._low_bit: dict[Tensor, HeldParameter] = {}  # one of each holder with low-bit states
        self._values: list[tuple[Tensor, Tensor]] = []  # where to, and what
        self._factors: dict[tuple[str, Block], Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, _, matrix, owned in subject.own_blocks():
            saved = found.trained.get(name)
            if saved is not None:
                data = torch.empty(matrix.block_bytes(owned.block), dtype=torch.uint8, device=matrix.device)
                self._factors[name, owned.block] = data
                self.tensors[block_key(self._in_file(saved), owned.block)] = data
        for name, entry in subject.trained.items():
            self._add_values(name, entry)
            self._add_states(name, entry)
        for other, stored in found.values:
            other.check()
            target = torch.empty(other.held.numel(), dtype=other.held.dtype, device=other.held.device)
            self._values.append((other.held, target))
            if len(target):
                kind, _, name = stored.partition("/")
                stored = key(kind, self._in_file(name)) if kind == VALUES else stored
                self.tensors[stored] = interval(target, other.shard, other.shape)

    def _in_file(self, saved: str) -> str:
        return self._in_files.get(saved, saved)

    # -- what is read --------------------------------------------------------------------------------------------------

    def _add_values(self, name: str, entry: HeldParameter) -> None:
        holder = local_tensor(entry.holder).detach()
        target = holder.new_empty(entry.shard.length)
        place = holder.view(-1)[entry.in_holder] if holder.is_contiguous() else holder
        self._values.append((place, target))
        if len(target):
            stored = self._fit.thawed.get(name) or key(VALUES, self._in_file(self._fit.trained[name]))
            self.tensors[stored] = interval(target, entry.shard, entry.shape)

    def _add_states(self, name: str, entry: HeldParameter) -> None:
        saved, holder = self._fit.trained.get(name), entry.holder
        state = self._states.setdefault(holder, {})
        place, like = self._subject.updates.in_states(entry), self._subject.updates.state_like(holder)
        if saved is None or place is None:
            return  # the parameter was not trained before, or the base keeps no states of it
        if local_tensor(holder).numel() == 0 and not is_dtensor(holder):
            return  # of FSDP1, which gives it no gradients: its count of steps would stand still
        for kind, described in self._manifest["parameters"][saved]["base"].items():
            if "dtype" not in described:
                self._set_number(entry, state, kind, described)
                continue
            if kind not in state:
                dtype = self._dtype(entry, kind, getattr(torch, described["dtype"]))
                state[kind] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format).detach()
            if entry.shard.length:
                part = local_tensor(state[kind]).view(-1)[place]
                self.tensors[key(kind, self._in_file(saved))] = interval(part, entry.shard, entry.shape)

    def _dtype(self, entry: HeldParameter, kind: str, saved: torch.dtype) -> torch.dtype:
        """In which a state is read: that which the base keeps it in, float32 for what it quantizes then."""
        made = self._subject.imagined_states(entry).get(kind)
        if kind == "step":
            return saved  # of a scalar parameter, in a checkpoint that takes it for elementwise
        if is_low_bit(made):
            self._low_bit[entry.holder] = entry
            return torch.float32
        if isinstance(made, Tensor):
            return made.dtype
        return entry.holder.dtype if saved.is_floating_point else saved  # as torch's load_state_dict casts

    def _set_number(self, entry: HeldParameter, state: dict[str, Any], kind: str, described: Mapping[str, Any]) -> None:
        value = described["value"]
        if kind in state and float(state[kind]) != value:
            raise ValueError(
                f"ZeRO keeps one {kind} for all parameters of a group, but {entry.name} has {value:g} in the "
                f"checkpoint and others {float(state[kind]):g}"
            )
        if not described["tensor"]:
            state[kind] = value
            return
        group = self._subject.groups[entry.group]
        on_device = kind != "step" or group.get("capturable") or group.get("fused")
        device = entry.holder.device if on_device else "cpu"
        state[kind] = torch.tensor(float(value), dtype=torch.float32, device=device)

    # -- put in place --------------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Put what was read in place."""
        optimizer = self._subject.optimizer
        for entry in self._low_bit.values():
            self._quantize(entry)
        for holder, state in self._states.items():
            optimizer.state.pop(holder, None)
            if state:
                optimizer.state[holder] = state
        with torch.no_grad():
            for place, values in self._values:
                place.copy_(values.view(place.shape))
        for name, matrix in self._subject.matrices():
            saved = self._fit.trained.get(name)
            factors = {} if saved is None else self._manifest["parameters"][saved]["factors"]
            matrix.step = factors.get("step", 0)
            matrix.roots = factors.get("roots", int(factors.get("rooted", False)))  # "rooted" in format 1
        for name, distributor, matrix, owned in self._subject.own_blocks():
            data = self._factors.get((name, owned.block))
            distributor.preconditioner.from_bytes(owned, fresh_block(matrix, owned.block) if data is None else data)
        self._subject.mark_loaded()
        self._restore_groups()

    def _quantize(self, entry: HeldParameter) -> None:
        """Put low-bit states, which the base itself makes, in the place of the floats that were read."""
        state, group = self._states[entry.holder], self._subject.groups[entry.group]
        like = self._subject.updates.state_like(entry.holder)
        (made,) = self._subject.optimizer.base.states_of([like], group)
        for kind, value in made.items():
            if kind in state and is_low_bit(value):
                local_tensor(value).copy_(local_tensor(state[kind]))
                state[kind] = value

    def _restore_groups(self) -> None:
        """Give each group the options of the groups that its parameters were saved in, as far as these agree."""
        for number, names in self._sources().items():
            group = self._subject.groups[number]
            first, *others = (self._manifest["groups"][source] for source in names)
            agreed = {}
            for option, value in first.items():
                values = [value, *(other.get(option) for other in others)]
                if all(other == value for other in values):
                    agreed[option] = value
                else:
                    said = ", ".join(f"{value!r} of {name}" for value, name in zip(values, names.values(), strict=True))
                    warn(
                        f"param group {number} has parameters of several groups of the checkpoint, whose {option} "
                        f"differ ({said}): it keeps {group.get(option)!r}"
                    )
            restored = _as_before(agreed, group)
            without = {option: value for option, value in restored.items() if option != "soap_betas"}
            refused = _refusal({**group, **restored})
            if refused and not _refusal({**group, **without}):  # what an earlier version took
                warn(f"param group {number} keeps soap_betas={group['soap_betas']}: {refused}")
                restored = without
            group.update(restored)

    def _sources(self) -> dict[int, dict[int, str]]:
        """By groups: the groups in the checkpoint that their parameters were in, each with a parameter of it."""
        sources: dict[int, dict[int, str]] = {}
        for name, entry in self._subject.trained.items():
            saved = self._fit.trained.get(name)
            if saved is not None:
                number = self._manifest["parameters"][saved]["group"]
                sources.setdefault(entry.group, {}).setdefault(number, entry.name)
        return sources


def _refusal(group: Mapping[str, Any]) -> str:
    """What is wrong with a group's options; empty if nothing is."""
    try:
        PreconditionerOptions.of_group(group)
    except ValueError as error:
        return str(error)
    return ""


def _as_before(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Options from a manifest, with tuples where the group has tuples and tensors where it has tensors."""
    options = {name: value for name, value in saved.items() if name != VERSION_KEY}
    for name, value in options.items():
        if isinstance(group.get(name), tuple):
            options[name] = tuple(value)
        elif isinstance(group.get(name), Tensor):
            options[name] = torch.full_like(group[name], value)
    return options
