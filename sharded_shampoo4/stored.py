"""What a portable checkpoint stores of an optimizer: names and numbers for its manifest, tensors for its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from . import base_states
from .binding import Binding
from .bindings import Bindings
from .integrations.fsdp import Location, is_dtensor, local_tensor
from .members import Entry
from .optimizer import Shampoo4
from .options import PreconditionerOptions
from .packing import shaping_difference
from .plan import Owned
from .preconditioner import Matrix
from .ranks import Ranks
from .untrained import Untrained

_VALUES = "values"  # of the parameter itself, beside the names of its base states


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
        bindings.members.check_named()
        held = bindings.everything(optimizer.param_groups)
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
                tensors[f"{key}/{entry.name}"] = _interval(part, location)
        for other in others:
            if other.location.replica == first[other.name] and other.location.stop > other.location.start:
                tensors[_untrained_key(other)] = _interval(other.held.reshape(-1), other.location)
        tensors.update(_factors(bindings))
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "param_names") and _is_plain(value)}
        for group in bindings.members.groups
    ]
    parameters: dict[str, dict[str, Any]] = {
        entry.name: {
            "shape": list(entry.shape),
            "options": entry.options.shaping_bytes(),
            "group": entry.group,
            "base": base[entry.name],
        }
        for entry, _, _ in held
    }
    for binding in bindings.all():
        for matrix in binding.matrices:
            steps = {"step": matrix.step, "rooted": matrix.rooted}
            parameters[matrix.name]["factors"] = {**steps, "blocks": _block_bytes(matrix)}
    rule = type(optimizer._base).__name__
    beside = {other.name: other.describe() for other in others}
    return {"base": rule, "groups": groups, "parameters": parameters, "untrained": beside}, tensors


def check(
    manifest: Mapping[str, Any], optimizer: Shampoo4, bindings: Bindings, others: Sequence[Untrained] | None
) -> None:
    """Raise ValueError, with both values, unless what ``manifest`` describes fits this optimizer.

    ``others`` is what is to be loaded beside what is trained; None leaves that out.
    """
    bindings.members.check_named()
    rule = type(optimizer._base).__name__
    if manifest["base"] != rule:
        raise ValueError(f"the checkpoint is of base optimizer {manifest['base']}, this one has {rule}")
    saved: Mapping[str, Any] = manifest["parameters"]
    entries = {entry.name: entry for entry, _, _ in bindings.everything(optimizer.param_groups)}
    _check_shapes(saved, {name: entry.shape for name, entry in entries.items()})
    if others is not None:
        shapes = {other.name: other.location.shape for other in others}
        _check_shapes(
            manifest.get("untrained", {}), shapes, "frozen parameter or buffer ", ": was it saved without model=?"
        )
    imagination = Imagination(optimizer, bindings)
    for name, entry in entries.items():
        if saved[name]["base"]:
            held = torch.Size([local_tensor(entry.holder).numel()])
            base_states.refuse_unportable(type(optimizer._base), name, imagination.of(entry), held)
        difference = shaping_difference(PreconditionerOptions.of_group(saved[name]["options"]), entry.options)
        if difference:
            raise ValueError(f"{name} in the checkpoint has {difference}")
    matrices = {matrix.name: matrix for binding in bindings.all() for matrix in binding.matrices}
    for name, matrix in matrices.items():
        blocks = _block_bytes(matrix)
        found = saved[name].get("factors", {}).get("blocks")
        if found != blocks:
            raise ValueError(f"{name} has factors {_few(found)} in the checkpoint and {_few(blocks)} here")


def _check_shapes(saved: Mapping[str, Any], here: Mapping[str, torch.Size], kind: str = "", hint: str = "") -> None:
    missing, unknown = sorted(here.keys() - saved.keys()), sorted(saved.keys() - here.keys())
    if missing:
        raise ValueError(f"the checkpoint has no {kind}{', '.join(missing[:3])}{hint}")
    if unknown:
        raise ValueError(f"there is no {kind}{', '.join(unknown[:3])} here")
    for name, shape in here.items():
        if list(shape) != saved[name]["shape"]:
            where = f"{name} (not trained)" if kind else name
            raise ValueError(f"{where} has shape {saved[name]['shape']} in the checkpoint and {list(shape)} here")


class Imagination:
    """The states that the base would make of parameters, on the meta device; empty where it cannot tell."""

    def __init__(self, optimizer: Shampoo4, bindings: Bindings) -> None:
        self._optimizer, self._bindings = optimizer, bindings
        self._known: dict[tuple[int, int, torch.dtype], base_states.State] = {}

    def of(self, entry: Entry) -> base_states.State:
        """Those of a parameter, or of the flat tensor that has it: vectors of this rank's elements, and numbers."""
        holder = local_tensor(entry.holder)
        key = (entry.group, holder.numel(), holder.dtype)
        if key not in self._known:
            rule, arguments = type(self._optimizer._base), self.arguments(entry)
            imagined = base_states.imagine(rule, arguments, [holder.numel()], holder.dtype)
            self._known[key] = imagined[0] if imagined else {}
        return self._known[key]

    def arguments(self, entry: Entry) -> dict[str, Any]:
        """Those of the base, for a parameter of this one's group."""
        return self._optimizer._base_arguments_of(self._bindings.members.group(entry.group))


class Restoration:
    """New tensors to read a checkpoint into, which replace the optimizer's once all of them are there."""

    def __init__(
        self, manifest: Mapping[str, Any], optimizer: Shampoo4, bindings: Bindings, others: Sequence[Untrained]
    ) -> None:
        self._manifest, self._optimizer, self._bindings = manifest, optimizer, bindings
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._low_bit: dict[Tensor, Entry] = {}  # one of each holder's whose states the base keeps in low precision
        self._values: list[tuple[Tensor, Tensor]] = []  # where to, and what
        self._imagination = Imagination(optimizer, bindings)
        self._factors = {
            _block_key(matrix.name, owned.block): torch.empty(
                matrix.block_bytes(owned.block), dtype=torch.uint8, device=matrix.device
            )
            for _, matrix, owned in _own_blocks(bindings)
        }
        self.tensors: dict[str, Tensor] = dict(self._factors)
        self._held = bindings.everything(optimizer.param_groups)
        for entry, location, offset in self._held:
            self._add(entry, location, offset)
        for other in others:
            target = torch.empty(other.held.numel(), dtype=other.held.dtype, device=other.held.device)
            self._values.append((other.held, target))
            if len(target):
                self.tensors[_untrained_key(other)] = _interval(target, other.location)

    def _add(self, entry: Entry, location: Location, offset: int) -> None:
        saved = self._manifest["parameters"][entry.name]["base"]
        state = self._states.setdefault(entry.holder, {})
        length = location.stop - location.start
        holder = local_tensor(entry.holder)
        target = holder.detach().new_empty(length)
        place = holder.detach().view(-1)[offset : offset + length] if holder.is_contiguous() else holder.detach()
        self._values.append((place, target))
        if length:
            self.tensors[f"{_VALUES}/{entry.name}"] = _interval(target, location)
        if holder.numel() == 0 and not is_dtensor(entry.holder):
            return  # of FSDP1, which gives it no gradients: its count of steps would stand still
        for key, described in saved.items():
            if "dtype" not in described:
                self._set_number(entry, state, key, described)
                continue
            if key not in state:
                dtype = self._dtype(entry, key, getattr(torch, described["dtype"]))
                state[key] = torch.zeros_like(entry.holder, dtype=dtype, memory_format=torch.contiguous_format).detach()
            part = local_tensor(state[key]).view(-1)[offset : offset + length]
            if length:
                self.tensors[f"{key}/{entry.name}"] = _interval(part, location)

    def _dtype(self, entry: Entry, key: str, saved: torch.dtype) -> torch.dtype:
        """In which a state is read: that which the base keeps it in, float32 for what it quantises then."""
        made = self._imagination.of(entry).get(key)
        if base_states.is_low_bit(made):
            self._low_bit[entry.holder] = entry
            return torch.float32
        if isinstance(made, Tensor):
            return made.dtype
        return entry.holder.dtype if saved.is_floating_point else saved  # as torch's load_state_dict casts

    def _quantise(self, entry: Entry) -> None:
        """Put low-bit states, which the base itself makes, in the place of the floats that were read."""
        rule, state = type(self._optimizer._base), self._states[entry.holder]
        (made,) = base_states.make(rule, self._imagination.arguments(entry), [entry.holder])
        for key, value in made.items():
            if key in state and base_states.is_low_bit(value):
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
        state[key] = torch.tensor(float(value), device=entry.holder.device if on_device else None)

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
                saved = self._manifest["parameters"][matrix.name]["factors"]
                matrix.step, matrix.rooted = saved["step"], saved["rooted"]
        for binding, matrix, owned in _own_blocks(self._bindings):
            binding.preconditioner.from_bytes(owned, self._factors[_block_key(matrix.name, owned.block)])
        groups = {entry.group: self._manifest["parameters"][entry.name]["group"] for entry, _, _ in self._held}
        for number, saved_number in groups.items():
            group = self._bindings.members.group(number)
            group.update(_as_before(self._manifest["groups"][saved_number], group))


def _as_before(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Options from a manifest, with tuples where the group has tuples and tensors where it has tensors."""
    options = dict(saved)
    for name, value in saved.items():
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


def _own_blocks(bindings: Bindings) -> Iterator[tuple[Binding, Matrix, Owned]]:
    """All blocks that this rank owns."""
    for binding in bindings.all():
        for index, matrix in enumerate(binding.matrices):
            for owned in binding.own_blocks(index).values():
                yield binding, matrix, owned


def _factors(bindings: Bindings) -> dict[str, Tensor]:
    """The factors of this rank's blocks, as bytes."""
    return {
        _block_key(matrix.name, owned.block): binding.preconditioner.to_bytes(owned)
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
    vectors = {_VALUES: holder.reshape(-1)}
    for key, value in optimizer.state.get(entry.holder, {}).items():
        if isinstance(value, Tensor) and value.shape == entry.holder.shape:
            vectors[key] = base_states.floats(value)
    return vectors


def _describe_base(optimizer: Shampoo4, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {}
    state = optimizer.state.get(entry.holder, {})
    base_states.refuse_unportable(type(optimizer._base), entry.name, state, entry.holder.shape)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == entry.holder.shape:
            dtype = torch.float32 if base_states.is_low_bit(value) else value.dtype
            described[key] = {"dtype": str(dtype).removeprefix("torch.")}
        elif isinstance(value, Tensor):
            described[key] = {"value": float(value), "tensor": True}
        else:
            described[key] = {"value": value, "tensor": False}
    return described


def _few(blocks: Mapping[str, Any] | None) -> str:
    return f"{len(blocks)} blocks of {sum(blocks.values())} bytes" if blocks else "no blocks"
