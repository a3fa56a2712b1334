"""What a portable checkpoint stores: names and numbers for its manifest, tensors for its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..held import HeldParameter
from ..marks import MARK
from ..numerics.matrix import Matrix
from ..placement import local_tensor
from ..planning.shards import Shard
from ..tensors import floats, is_low_bit
from .consistency import check_arguments, check_trained
from .subject import Subject
from .vectors import UNTRAINED, VALUES, Interval, block_key, key

_MEMBERS = ("params", "param_names")  # of a param group
_Described = tuple[int, dict[str, Any]]  # the replica that holds a parameter on a rank, and what the base keeps there


def collect(subject: Subject) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Collect what the manifest says of the contents, and this rank's tensors, by their keys; collective.

    Raises:
        ValueError: on every rank alike, if parameters have no names of their own, two have the same, the base keeps
            states that are neither numbers nor elementwise, a buffer is not dense, or ranks differ in what they train
            or were given.
    """
    ranks = subject.ranks
    with ranks.together():
        _refuse_double_names(subject)
        mine = {name: (entry.shard.replica, _describe_base(subject, entry)) for name, entry in subject.trained.items()}
        for other in subject.saved_untrained:
            other.check()
        replicas = {other.name: other.shard.replica for other in subject.saved_untrained}
    everyone = ranks.gather((subject.arguments, mine, replicas))
    check_arguments([arguments for arguments, _, _ in everyone])
    base, writers = _agree([described for _, described, _ in everyone])
    first: dict[str, int] = {}  # the first replica of what is not trained
    for _, _, replica_of in everyone:
        for name, replica in replica_of.items():
            first[name] = min(replica, first.get(name, replica))
    with ranks.together():
        tensors: dict[str, Tensor] = {}
        for name, entry in subject.trained.items():
            if entry.shard.replica == writers[name] and entry.shard.length:
                for kind, part in _parts(subject, entry):
                    tensors[key(kind, name)] = interval(part, entry.shard, entry.shape)
        for other in subject.saved_untrained:
            if other.shard.replica == first[other.name] and other.shard.length:
                tensors[key(UNTRAINED, other.name)] = interval(other.held.reshape(-1), other.shard, other.shape)
        for name, distributor, _, owned in subject.own_blocks():
            tensors[block_key(name, owned.block)] = distributor.preconditioner.to_bytes(owned)
        manifest = _describe(subject, base)
    return manifest, tensors


def block_bytes(matrix: Matrix) -> dict[str, int]:
    """Weigh a matrix's factors, block by block, in bytes."""
    return {f"{block.row},{block.column}": matrix.block_bytes(block) for block in matrix.blocks}


def interval(part: Tensor, shard: Shard, shape: torch.Size) -> Interval:
    """Return this rank's ``part`` of a flattened tensor of ``shape`` as DCP takes it."""
    return Interval.of(part, shard, shape.numel())


def _refuse_double_names(subject: Subject) -> None:
    double = subject.trained.keys() & {other.name for other in subject.saved_untrained}
    if double:
        raise ValueError(f"a parameter that is trained and one that is not have the name {min(double)}")


def _agree(everyone: Sequence[Mapping[str, _Described]]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What the base keeps of each trained parameter, and the replica that writes it: they take turns."""
    check_trained(everyone)
    base: dict[str, dict[str, Any]] = {}
    writers: dict[str, int] = {}
    for index, name in enumerate(everyone[0]):
        described = [of_rank[name] for of_rank in everyone]
        base[name] = next((found for _, found in described if found), {})
        replicas = sorted({replica for replica, _ in described})
        writers[name] = replicas[index % len(replicas)]
    return base, writers


def _describe(subject: Subject, base: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the contents."""
    parameters: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(entry.shape),
            "options": entry.options.shaping_bytes(),
            "group": entry.group,
            "base": base[name],
        }
        for name, entry in subject.trained.items()
    }
    for name, matrix in subject.matrices():
        parameters[name]["factors"] = {"step": matrix.step, "roots": matrix.roots, "blocks": block_bytes(matrix)}
    groups = [
        {name: plain for name, value in group.items() if name not in _MEMBERS and _fits_json(plain := _plain(value))}
        for group in subject.groups
    ]
    progress = subject.host.progress()
    return {
        "plain_names": True,
        "base": subject.optimizer.base.name,
        "groups": groups,
        "parameters": parameters,
        "untrained": {other.name: other.describe() for other in subject.saved_untrained},
        "frozen": subject.frozen,
        **({} if progress is None else {"engine": progress}),
    }


def _plain(value: Any) -> Any:
    """A number instead of a tensor or a NumPy scalar that holds one, and a list instead of a tuple."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    of_numpy = type(value).__module__ == "numpy" and value.ndim == 0
    return value.item() if of_numpy or (isinstance(value, Tensor) and value.numel() == 1) else value


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _parts(subject: Subject, entry: HeldParameter) -> Iterator[tuple[str, Tensor]]:
    """This rank's elements of a parameter's values and of the base's elementwise states, each with its kind."""
    yield VALUES, local_tensor(entry.holder).detach().reshape(-1)[entry.in_holder]
    place = subject.updates.in_states(entry)
    if place is not None:
        for kind, value in _base_state(subject, entry.holder).items():
            if subject.is_elementwise(entry, kind, value):
                yield kind, floats(value)[place]


def _base_state(subject: Subject, holder: Tensor) -> dict[str, Any]:
    """What the base keeps of what it steps on."""
    return {kind: value for kind, value in subject.optimizer.state.get(holder, {}).items() if value is not MARK}


def _describe_base(subject: Subject, entry: HeldParameter) -> dict[str, Any]:
    """What the manifest says of the base's states; raises ValueError if they cannot be stored."""
    described = dict[str, Any]()
    if entry.is_soap:
        return described
    state, shape = _base_state(subject, entry.holder), subject.updates.state_like(entry.holder).shape
    subject.optimizer.base.refuse_unportable(entry.name, state, shape)
    for kind, value in state.items():
        if subject.is_elementwise(entry, kind, value):
            dtype = "float32" if is_low_bit(value) else str(value.dtype).removeprefix("torch.")
            described[kind] = {"dtype": dtype}
        elif isinstance(value, Tensor):
            described[kind] = {"value": float(value), "tensor": True}
        else:
            described[kind] = {"value": value, "tensor": False}
    return described
