"""What a portable checkpoint stores of an optimizer: names and numbers for its manifest, tensors for its files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .base import State
from .bindings import Bindings
from .distributor import Distributor
from .fit import VALUES, Fit, fit
from .members import Entry
from .names import match_names, plain_names
from .optimizer import Shampoo4
from .options import PreconditionerOptions
from .packing import VERSION_KEY, refuse_former_levels, shaping_difference
from .placement import Location, is_dtensor, local_tensor
from .plan import Owned
from .preconditioner import Matrix, fresh_block
from .ranks import Ranks
from .state_dicts import MARK
from .tensors import floats, is_low_bit
from .untrained import Untrained


class Interval(Tensor):
    """A rank's part of a vector that is spread over ranks, as DCP takes it: elements ``start`` on of ``total``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    start: int
    total: int

    @staticmethod
    def of(part: Tensor, start: int, total: int) -> Interval:
        interval = part.detach().as_subclass(Interval)
        interval.start, interval.total = start, total
        return interval

    def size(self, dim: int | None = None) -> Any:
        """Of the whole vector, which is what DCP compares with what is stored."""
        return torch.Size([self.total]) if dim is None else self.total

    def _part(self) -> Tensor:
        return self.as_subclass(Tensor)

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self._part().numel()]))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._part())
        data = TensorWriteData(self._chunk(), properties, torch.Size([self.total]))
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._part()


def on_host(tensor: Tensor) -> Tensor:
    """A copy of what :func:`collect` gave, in the host's memory."""
    if isinstance(tensor, Interval):
        return Interval.of(tensor._part().to("cpu", copy=True), tensor.start, tensor.total)
    return tensor.to("cpu", copy=True)


def collect(
    optimizer: Shampoo4, bindings: Bindings, ranks: Ranks, others: Sequence[Untrained]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest's part on parameters, and this rank's tensors, by their keys; collective.

    ``others`` is what is to be saved beside what is trained. Raises ValueError, on every rank alike, if parameters have
    no names of their own.
    """
    with ranks.together():
        names = bindings.members.plain_names()
        held = bindings.everything(optimizer.param_groups)
        double = {names[entry.name] for entry, _, _ in held} & {other.name for other in others}
        if double:
            raise ValueError(f"a parameter that is trained and one that is not have the name {min(double)}")
        described = [(entry.name, place.replica, _describe_base(optimizer, entry)) for entry, place, _ in held]
    base: dict[str, dict[str, Any]] = {}
    writers: dict[str, int] = {}  # the replica that writes: they take turns
    everyone = ranks.gather((described, {other.name: other.location.replica for other in others}))
    first: dict[str, int] = {}  # the first replica of what is not trained
    for _, replica_of in everyone:
        for name, replica in replica_of.items():
            first[name] = min(replica, first.get(name, replica))
    for index, entries in enumerate(zip(*(trained for trained, _ in everyone), strict=True)):
        name = entries[0][0]
        base[name] = next((found for _, _, found in entries if found), {})
        replicas = sorted({replica for _, replica, _ in entries})
        writers[name] = replicas[index % len(replicas)]

    tensors: dict[str, Tensor] = {}
    with ranks.together():
        for entry, location, offset in held:
            if location.replica != writers[entry.name] or location.start == location.stop:
                continue
            for key, vector in _vectors(optimizer, entry).items():
                part = vector[offset : offset + location.stop - location.start]
                tensors[f"{key}/{names[entry.name]}"] = _interval(part, location)
        for other in others:
            if other.location.replica == first[other.name] and other.location.stop > other.location.start:
                tensors[_untrained_key(other)] = _interval(other.held.reshape(-1), other.location)
        tensors.update(_factors(bindings, names))
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "param_names") and _is_plain(value)}
        for group in bindings.members.groups
    ]
    parameters: dict[str, dict[str, Any]] = {
        names[entry.name]: {
            "shape": list(entry.shape),
            "options": entry.options.shaping_bytes(),
            "group": entry.group,
            "base": base[entry.name],
        }
        for entry, _, _ in held
    }
    for binding in bindings.all():
        for matrix in binding.matrices:
            steps = {"step": matrix.step, "roots": matrix.roots}
            parameters[names[matrix.name]]["factors"] = {**steps, "blocks": _block_bytes(matrix)}
    rule = optimizer.base.name
    beside = {other.name: other.describe() for other in others}
    described_names = {"plain_names": True, "base": rule, "groups": groups}
    return {**described_names, "parameters": parameters, "untrained": beside}, tensors


def check(
    manifest: Mapping[str, Any],
    optimizer: Shampoo4,
    bindings: Bindings,
    others: Sequence[Untrained],
    with_model: bool,
    frozen: bool,
) -> Fit:
    """What of the checkpoint goes where.

    ``others`` is what is here beside what is trained; ``with_model`` and ``frozen`` are as :func:`.fit.fit` takes them.
    Raises ValueError, with both values, unless what ``manifest`` describes fits this optimizer.
    """
    names = bindings.members.plain_names()
    rule = optimizer.base.name
    if manifest["base"] != rule:
        raise ValueError(f"the checkpoint is of base optimizer {manifest['base']}, this one has {rule}")
    saved: Mapping[str, Any] = manifest["parameters"]
    entries = {names[entry.name]: entry for entry, _, _ in bindings.everything(optimizer.param_groups)}
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = fit(manifest, shapes, others, match_names, with_model, frozen)
    imagination = Imagination(optimizer, bindings)
    for here, name in found.trained.items():
        entry = entries[here]
        if saved[name]["base"]:
            held = torch.Size([local_tensor(entry.holder).numel()])
            optimizer.base.refuse_unportable(here, imagination.of(entry), held)
        options = PreconditionerOptions.of_group(saved[name]["options"])
        refuse_former_levels(manifest["format"], options, f"{here} in the checkpoint")
        difference = shaping_difference(options, entry.options)
        if difference:
            raise ValueError(f"{here} in the checkpoint has {difference}")
    for matrix in (matrix for binding in bindings.all() for matrix in binding.matrices):
        here = names[matrix.name]
        if here in found.trained:
            blocks = _block_bytes(matrix)
            there = saved[found.trained[here]].get("factors", {}).get("blocks")
            if there != blocks:
                raise ValueError(f"{here} has factors {_few(there)} in the checkpoint and {_few(blocks)} here")
    return found


def with_plain_names(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A manifest whose names are plain, and the names as its files have them, by those that are not as they were.

    Early versions stored names with what wrappers put into them. Raises ValueError if two of them become equal.
    """
    if manifest.get("plain_names"):
        return manifest, {}
    saved = manifest["parameters"]
    names = dict(zip(plain_names(list(saved)), saved, strict=True))
    return {**manifest, "parameters": {plain: saved[name] for plain, name in names.items()}}, names


class Imagination:
    """The states that the base would make of parameters, on the meta device; empty where it cannot tell."""

    def __init__(self, optimizer: Shampoo4, bindings: Bindings) -> None:
        self._optimizer, self._bindings = optimizer, bindings
        self._known: dict[tuple[int, int, torch.dtype], State] = {}

    def of(self, entry: Entry) -> State:
        """Those of a parameter, or of the flat tensor that has it: vectors of this rank's elements, and numbers."""
        holder = local_tensor(entry.holder)
        key = (entry.group, holder.numel(), holder.dtype)
        if key not in self._known:
            group = self._bindings.members.group(entry.group)
            imagined = self._optimizer.base.meta_states([holder.numel()], holder.dtype, group)
            self._known[key] = imagined[0] if imagined else {}
        return self._known[key]


class Restoration:
    """New tensors to read a checkpoint into, which replace the optimizer's once all of them are there.

    ``there`` is what :func:`check` gave, ``stored`` the names in files that are not those in the manifest.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        optimizer: Shampoo4,
        bindings: Bindings,
        there: Fit,
        stored: Mapping[str, str],
    ) -> None:
        self._manifest, self._optimizer, self._bindings = manifest, optimizer, bindings
        self._fit, self._stored, self._names = there, stored, bindings.members.plain_names()
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._low_bit: dict[Tensor, Entry] = {}  # one of each holder's whose states the base keeps in low precision
        self._values: list[tuple[Tensor, Tensor]] = []  # where to, and what
        self._imagination = Imagination(optimizer, bindings)
        self._factors: dict[tuple[str, Any], Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        for _, matrix, owned in _own_blocks(bindings):
            saved = self._saved(matrix.name)
            if saved is None:
                continue
            data = torch.empty(matrix.block_bytes(owned.block), dtype=torch.uint8, device=matrix.device)
            self._factors[matrix.name, owned.block] = data
            self.tensors[_block_key(self._in_file(saved), owned.block)] = data
        self._held = bindings.everything(optimizer.param_groups)
        for entry, location, offset in self._held:
            self._add(entry, location, offset)
        for other, key in there.values:
            target = torch.empty(other.held.numel(), dtype=other.held.dtype, device=other.held.device)
            self._values.append((other.held, target))
            if len(target):
                kind, _, name = key.partition("/")
                key = f"{kind}/{self._in_file(name)}" if kind == VALUES else key
                self.tensors[key] = _interval(target, other.location)

    def _saved(self, label: str) -> str | None:
        """A parameter's name in the checkpoint; None if it was not trained then."""
        return self._fit.trained.get(self._names[label])

    def _in_file(self, saved: str) -> str:
        return self._stored.get(saved, saved)

    def _add(self, entry: Entry, location: Location, offset: int) -> None:
        name = self._saved(entry.name)
        state = self._states.setdefault(entry.holder, {})
        length = location.stop - location.start
        holder = local_tensor(entry.holder)
        target = holder.detach().new_empty(length)
        place = holder.detach().view(-1)[offset : offset + length] if holder.is_contiguous() else holder.detach()
        self._values.append((place, target))
        if length:
            thawed = self._fit.thawed.get(self._names[entry.name])
            self.tensors[thawed or f"{VALUES}/{self._in_file(name or '')}"] = _interval(target, location)
        if name is None:
            return  # it was not trained: its states begin anew
        if holder.numel() == 0 and not is_dtensor(entry.holder):
            return  # of FSDP1, which gives it no gradients: its count of steps would stand still
        for key, described in self._manifest["parameters"][name]["base"].items():
            if "dtype" not in described:
                self._set_number(entry, state, key, described)
                continue
            if key not in state:
                dtype = self._dtype(entry, key, getattr(torch, described["dtype"]))
                state[key] = torch.zeros_like(entry.holder, dtype=dtype, memory_format=torch.contiguous_format).detach()
            part = local_tensor(state[key]).view(-1)[offset : offset + length]
            if length:
                self.tensors[f"{key}/{self._in_file(name)}"] = _interval(part, location)

    def _dtype(self, entry: Entry, key: str, saved: torch.dtype) -> torch.dtype:
        """In which a state is read: that which the base keeps it in, float32 for what it quantises then."""
        made = self._imagination.of(entry).get(key)
        if is_low_bit(made):
            self._low_bit[entry.holder] = entry
            return torch.float32
        if isinstance(made, Tensor):
            return made.dtype
        return entry.holder.dtype if saved.is_floating_point else saved  # as torch's load_state_dict casts

    def _quantise(self, entry: Entry) -> None:
        """Put low-bit states, which the base itself makes, in the place of the floats that were read."""
        state, group = self._states[entry.holder], self._bindings.members.group(entry.group)
        (made,) = self._optimizer.base.states_of([entry.holder], group)
        for key, value in made.items():
            if key in state and is_low_bit(value):
                local_tensor(value).copy_(local_tensor(state[key]))
                state[key] = value

    def _set_number(self, entry: Entry, state: dict[str, Any], key: str, described: Mapping[str, Any]) -> None:
        value = described["value"]
        if key in state and float(state[key]) != value:
            raise ValueError(
                f"ZeRO keeps one {key} for all parameters of a group, but {entry.name} has {value:g} in the checkpoint "
                f"and others {float(state[key]):g}"
            )
        if not described["tensor"]:
            state[key] = value
            return
        group = self._bindings.members.group(entry.group)
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        state[key] = torch.tensor(float(value), dtype=torch.float32, device=entry.holder.device if on_device else "cpu")

    def apply(self) -> None:
        """Put what was read in place."""
        for entry in self._low_bit.values():
            self._quantise(entry)
        for holder, state in self._states.items():
            self._optimizer.state.pop(holder, None)
            if state:
                self._optimizer.state[holder] = state
        with torch.no_grad():
            for place, values in self._values:
                place.copy_(values.view(place.shape))
        for binding in self._bindings.all():
            for matrix in binding.matrices:
                name = self._saved(matrix.name)
                saved = {} if name is None else self._manifest["parameters"][name]["factors"]
                matrix.step = saved.get("step", 0)
                matrix.roots = saved.get("roots", int(saved.get("rooted", False)))  # "rooted" in format 1
        for binding, matrix, owned in _own_blocks(self._bindings):
            data = self._factors.get((matrix.name, owned.block))
            binding.preconditioner.from_bytes(owned, fresh_block(matrix, owned.block) if data is None else data)
        self._bindings.mark_loaded(self._optimizer.state)
        self._restore_groups()

    def _restore_groups(self) -> None:
        """Give each group the options of the groups that its parameters were saved in, as far as these agree."""
        sources: dict[int, dict[int, str]] = {}  # by groups: the groups in the checkpoint, each with a parameter of it
        for entry, _, _ in self._held:
            name = self._saved(entry.name)
            if name is not None:
                number = self._manifest["parameters"][name]["group"]
                sources.setdefault(entry.group, {}).setdefault(number, entry.name)
        for number, names in sources.items():
            group = self._bindings.members.group(number)
            first, *others = (self._manifest["groups"][source] for source in names)
            agreed = {}
            for option, value in first.items():
                values = [value, *(other.get(option) for other in others)]
                if all(other == value for other in values):
                    agreed[option] = value
                else:
                    said = ", ".join(f"{value!r} of {name}" for value, name in zip(values, names.values(), strict=True))
                    warnings.warn(
                        f"param group {number} has parameters of several groups of the checkpoint, whose {option} "
                        f"differ ({said}): it keeps {group.get(option)!r}",
                        stacklevel=4,
                    )
            group.update(_as_before(agreed, group))


def _as_before(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Options from a manifest, with tuples where the group has tuples and tensors where it has tensors."""
    options = {name: value for name, value in saved.items() if name != VERSION_KEY}
    for name, value in options.items():
        if isinstance(group.get(name), tuple):
            options[name] = tuple(value)
        elif isinstance(group.get(name), Tensor):
            options[name] = torch.full_like(group[name], value)
    return options


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _own_blocks(bindings: Bindings) -> Iterator[tuple[Distributor, Matrix, Owned]]:
    """All blocks that this rank owns."""
    for binding in bindings.all():
        for index, matrix in enumerate(binding.matrices):
            for owned in binding.own_blocks(index).values():
                yield binding, matrix, owned


def _factors(bindings: Bindings, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The factors of this rank's blocks, as bytes."""
    return {
        _block_key(names[matrix.name], owned.block): binding.preconditioner.to_bytes(owned)
        for binding, matrix, owned in _own_blocks(bindings)
    }


def _block_bytes(matrix: Matrix) -> dict[str, int]:
    """The bytes of a matrix's factors, block by block."""
    return {f"{block.row},{block.column}": matrix.block_bytes(block) for block in matrix.blocks}


def _interval(part: Tensor, location: Location) -> Interval:
    return Interval.of(part, location.start, location.shape.numel())


def _untrained_key(other: Untrained) -> str:
    return f"untrained/{other.name}"


def _block_key(name: str, block: Any) -> str:
    return f"factors/{name}/{block.row},{block.column}"


def _vectors(optimizer: Shampoo4, entry: Entry) -> dict[str, Tensor]:
    """A holder's values and elementwise base states, flattened, of this rank."""
    holder = local_tensor(entry.holder).detach()
    vectors = {VALUES: holder.reshape(-1)}
    for key, value in _base_state(optimizer, entry.holder).items():
        if isinstance(value, Tensor) and value.shape == entry.holder.shape:
            vectors[key] = floats(value)
    return vectors


def _base_state(optimizer: Shampoo4, holder: Tensor) -> dict[str, Any]:
    """What the base keeps of a parameter."""
    return {key: value for key, value in optimizer.state.get(holder, {}).items() if value is not MARK}


def _describe_base(optimizer: Shampoo4, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {}
    state = _base_state(optimizer, entry.holder)
    optimizer.base.refuse_unportable(entry.name, state, entry.holder.shape)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == entry.holder.shape:
            dtype = torch.float32 if is_low_bit(value) else value.dtype
            described[key] = {"dtype": str(dtype).removeprefix("torch.")}
        elif isinstance(value, Tensor):
            described[key] = {"value": float(value), "tensor": True}
        else:
            described[key] = {"value": value, "tensor": False}
    return described


def _few(blocks: Mapping[str, Any] | None) -> str:
    return f"{len(blocks)} blocks of {sum(blocks.values())} bytes" if blocks else "no blocks"
