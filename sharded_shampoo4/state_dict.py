"""What ``state_dict()`` holds: the base's states and the factors as bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .comm.ranks import DeferredErrors
from .marks import STATE_KEY as STATE_KEY
from .names import match_names
from .numerics.matrix import Matrix
from .options import PreconditionerOptions
from .packing import PackedPieces, PackedState, fresh_bytes, pack, pack_pieces, refuse_former_levels, shaping_difference
from .placement import is_dtensor, shard_vector
from .report import shorten, warn

if TYPE_CHECKING:
    from .session import Session

FORMAT_VERSION = 2  # 1: the code book "normal" had other levels, none of them zero
VERSION_KEY = "preconditioner_format"  # in each parameter group
PIECES_KEY = "preconditioner_pieces"  # in state_dict(), where flat tensors have replaced the parameters (ZeRO)

Loaded = PackedState | PackedPieces  # of parameters that no distributor has (yet)
_NOT_OPTIONS = ("params", "param_names")
_UNNAMED = "or one of the two optimizers was made without names, which tell stacked biases"
_FORMER_OPTIONS = {"compile"}  # which earlier versions wrote into parameter groups


@contextlib.contextmanager
def held_back(*hooks: dict[int, Any]) -> Iterator[None]:
    """Keep registered hooks from being called in here."""
    kept = [dict(registered) for registered in hooks]
    for registered in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, own in zip(hooks, kept, strict=True):
            registered.update(own)


# -- writing -----------------------------------------------------------------------------------------------------------


def packed_factors(session: Session, everywhere: bool) -> dict[Tensor, Tensor]:
    """Return every preconditioner there is, as bytes; under FSDP2 and HSDP sharded as parameters are, and collective.

    Args:
        session: of the optimizer.
        everywhere: whether all ranks call this, also where they hold whole parameters.

    Raises:
        RuntimeError: factors are spread over ranks that hold whole parameters, where programs save on one rank only.
    """
    attached = [parameter for distributor in session.all() for parameter in distributor.parameters]
    if not attached:
        return all_factors(session)
    if session.spread and not everywhere and not any(map(is_dtensor, attached)):
        fresh = _fresh_factors(session)
        if fresh is None:
            raise RuntimeError(
                "the factors of Shampoo4 are spread over ranks: call optimizer.consolidate_state_dict() on every "
                "rank before state_dict(), or use sharded_shampoo4.checkpoint. With a Trainer use PortableTrainer, "
                "with an Accelerator PortableAccelerator (sharded_shampoo4.integrations)"
            )
        return fresh
    session.begin("state_dict()")
    return all_factors(session)


def all_factors(session: Session, on_host: bool = False) -> dict[Tensor, Tensor]:
    """Return every preconditioner there is, as bytes; sharded where parameters are.

    Collective on several ranks if factors are spread over them, but not after :meth:`Session.load`, nor where nothing
    is preconditioned. ``on_host`` brings one after another to the host, so that a device holds those of one parameter
    at a time.
    """
    packed: dict[Tensor, Tensor] = {}
    distributors = [distributor for distributor in session.all() if distributor.parameters]
    errors = DeferredErrors(session.ranks) if distributors and session.ranks is not None else None
    for distributor in distributors:
        assert errors is not None
        for index, parameter in enumerate(distributor.parameters):
            part = errors.attempt(shard_vector, pack(distributor, index), parameter)
            if part is not None:
                packed[parameter] = part.cpu() if on_host else part
    if errors is not None:
        errors.raise_together()
    loaded = {p: entry.data.cpu() if on_host else entry.data for p, entry in session.loaded.items()}
    return {**packed, **loaded}


def _fresh_factors(session: Session) -> dict[Tensor, Tensor] | None:
    """What all factors are while none has taken a step, without asking other ranks; None otherwise."""
    pairs = [
        (p, m)
        for distributor in session.all()
        for p, m in zip(distributor.parameters, distributor.matrices, strict=True)
    ]
    if any(matrix.step for _, matrix in pairs):
        return None
    packed = {parameter: fresh_bytes(matrix) for parameter, matrix in pairs}
    return {**packed, **{parameter: entry.data for parameter, entry in session.loaded.items()}}


def own_pieces(session: Session) -> dict[int, dict[str, Any]]:
    """Return this rank's part of every preconditioner there is, by the place of the parameter among those given."""
    found: dict[Tensor, Loaded] = dict(session.loaded)
    for distributor in session.all():
        found.update(
            {parameter: pack_pieces(distributor, index) for index, parameter in enumerate(distributor.parameters)}
        )
    given = enumerate(session.members.given())
    places = {parameter: place for place, (_, parameter, options) in given if options.precondition}
    pieces = {places[parameter]: entry for parameter, entry in found.items() if parameter in places}
    return {place: entry.as_plain() for place, entry in sorted(pieces.items()) if isinstance(entry, PackedPieces)}


def join(plain: dict[str, Any], packed: Sequence[Tensor | None]) -> dict[str, Any]:
    """Return a base optimizer's state_dict with ``packed`` preconditioners, in the order of the groups' parameters.

    What stood for them in it is taken out.
    """
    state = separate(plain)[0]["state"]
    for key, data in zip(_keys(plain), packed, strict=True):
        if data is not None:
            state[key] = {**state.get(key, {}), STATE_KEY: data}
    return {**plain, "state": state}


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    state_dict: dict[str, Any], session: Session, groups: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[Tensor, Loaded]]:
    """Check a ``state_dict`` and take it apart.

    Args:
        state_dict: as :meth:`Shampoo4.state_dict` gave it.
        session: of the optimizer.
        groups: the optimizer's.

    Returns:
        the base's part, with its parameters in the order of ``groups``, and the factors.

    Raises:
        ValueError: it does not fit; with the option and both values, or the parameter's name.
    """
    members = session.members
    state_dict = _without_former_options(state_dict, groups)
    pieces = state_dict.pop(PIECES_KEY, None)
    if (pieces is not None) != members.partitioned:
        whole, parts = "a state_dict with whole parameters", "one rank's part of a state_dict under ZeRO 1, 2 or 3"
        found, wanted = (whole, parts) if pieces is None else (parts, whole)
        raise ValueError(f"this is {found}, where {wanted} is needed")
    current = [parameter for group in groups for parameter in group["params"]]
    known = {entry.parameter: entry for entry in members.entries(groups)}
    names = None if members.partitioned else members.names()
    if names is not None:
        state_dict = arranged(state_dict, names)
    standing = [(known[p].name, known[p].shape) if p in known else ("", p.shape) for p in current]
    check_loadable(state_dict, groups, standing, members.shapes(len(groups)))
    plain, packed = separate(state_dict)
    options = [PreconditionerOptions.of_group(group) for group in plain["param_groups"] for _ in group["params"]]
    loaded = _read_pieces(pieces or {}, session, plain["param_groups"])
    for parameter, option, data in zip(current, options, packed, strict=True):
        if data is not None:
            loaded[parameter] = PackedState(option, data.detach().clone())
    if (plain["state"] or loaded) and not members.partitioned:
        _warn_of_missing([known[p].name for p in current if p in known and known[p].is_soap and p not in loaded])
    versioned = [{**group, VERSION_KEY: FORMAT_VERSION} for group in plain["param_groups"]]
    return {**plain, "param_groups": versioned}, loaded


def _warn_of_missing(names: Sequence[str]) -> None:
    """Warn that a state_dict has states of other parameters, but none of these."""
    if names:
        warn(
            f"the state_dict has no states of {shorten(names)}, so these are reset: the parameters were not trained "
            "when it was saved, or their factors were removed"
        )


def _without_former_options(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    former = _FORMER_OPTIONS - groups[0].keys()
    known = [{key: group[key] for key in group if key not in former} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": known}


def _read_pieces(
    stored: Mapping[int, Mapping[str, Any]], session: Session, groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, Loaded]:
    """Undo :func:`own_pieces`, written with the options in ``groups``.

    Raises ValueError unless they are of these parameters, with options that fit.
    """
    given, host = session.members.given(), session.members.host
    shapes = session.members.shapes(len(groups))
    options = [PreconditionerOptions.of_group(group) for group, own in zip(groups, shapes, strict=True) for _ in own]
    loaded: dict[Tensor, Loaded] = {}
    for place, plain in stored.items():
        name, parameter, _ = given[place] if place < len(given) else ("", None, None)
        if parameter is None:
            raise ValueError(f"the state_dict has a preconditioner of parameter {place}, which is not there")
        piece = PackedPieces.of_plain(options[place], plain)
        matrix = Matrix.of(name, host.shape(parameter), options[place], piece.data.device)
        if matrix is None:
            raise ValueError(f"the state_dict has a preconditioner of {name}, which is not preconditioned here")
        piece.check(matrix)
        loaded[parameter] = piece
    return loaded


def separate(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Undo :func:`join`."""
    plain = {
        key: {name: value for name, value in entry.items() if name != STATE_KEY}
        for key, entry in state_dict["state"].items()
    }
    packed = [state_dict["state"].get(key, {}).get(STATE_KEY) for key in _keys(state_dict)]
    return {**state_dict, "state": {key: entry for key, entry in plain.items() if entry}}, packed


def check_loadable(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    standing: Sequence[tuple[str, Sequence[int]]],
    given: Sequence[Sequence[tuple[str, Sequence[int]]]],
) -> None:
    """Raise ValueError, with the option and both values or the parameter's name, unless ``state_dict`` fits.

    Args:
        state_dict: without pieces.
        groups: the optimizer's.
        standing: names and whole shapes of what stands in them, such as parameters or flat tensors.
        given: names and whole shapes of the parameters that were given, by group.
    """
    saved_groups = state_dict["param_groups"]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(f"the state_dict has param groups of {saved_sizes} parameters, this optimizer of {sizes}")
    for index, (saved, group, own) in enumerate(zip(saved_groups, groups, given, strict=True)):
        version = saved.get(VERSION_KEY)
        if version is None:
            raise ValueError(f"param group {index} of the state_dict was not written by Shampoo4")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the state_dict has format {version}, this version of Shampoo4 reads up to {FORMAT_VERSION}"
            )
        stored = PreconditionerOptions.of_group(saved)
        refuse_former_levels(version, stored, f"param group {index} of the state_dict")
        difference = shaping_difference(stored, PreconditionerOptions.of_group(group), own)
        if difference:
            raise ValueError(f"param group {index} of the state_dict has {difference}")

    plain, packed = separate(state_dict)
    options = [PreconditionerOptions.of_group(group) for group in saved_groups for _ in group["params"]]
    for key, data, option, (name, whole) in zip(_keys(plain), packed, options, standing, strict=True):
        matrix = Matrix.of(name, whole, option, torch.device("meta"))
        if matrix and data is not None:
            PackedState(option, data).check(matrix)
        elif matrix and key in plain["state"]:
            raise ValueError(
                f"the state_dict has a state of {name}, but no preconditioner: it is of another optimizer, was "
                f"collected from optimizer.state, {_UNNAMED}. Save optimizer.state_dict(), or use "
                "sharded_shampoo4.checkpoint"
            )
        elif data is not None:
            raise ValueError(
                f"the state_dict has a preconditioner of {name}, which is not preconditioned here: its options differ, "
                f"{_UNNAMED}"
            )


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def arranged(state_dict: dict[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """``state_dict`` with its parameters in the groups and in the order of ``names``, if it knows names too.

    torch itself loads by position, whatever the names.

    Raises:
        ValueError: it has other names, or several parameters of one name in another order; or a group here has
            parameters of several groups there, whose options differ.
    """
    groups = state_dict["param_groups"]
    given = [_names_of(group) for group in groups]
    saved = [name for own in given if own is not None for name in own]
    here = [name for own in names for name in own]
    if any(own is None for own in given) or len(saved) != len(here):
        return state_dict
    by_torch = all(isinstance(key, str) for group in groups for key in group["params"])  # it has put them in order
    double = sorted({name for own in (saved, here) for name in own if own.count(name) > 1})
    found = {} if double else match_names(saved, here)
    same = saved == here if double else [found.get(name) for name in saved] == here
    if same and [len(group["params"]) for group in groups] == [len(own) for own in names]:
        return state_dict
    if double and not by_torch:
        raise ValueError(
            f"several parameters have the name {double[0]} and their order has changed: no telling which is which"
        )
    if len(found) < len(here):
        if by_torch:
            return state_dict
        raise ValueError(
            f"the state_dict is of parameters {shorten(name for name in saved if name not in found)}, this optimizer "
            f"has {shorten(name for name in here if name not in found.values())}: to load by position, remove "
            "param_names from the state_dict's param_groups"
        )
    places = {
        found[name]: (number, key)
        for number, (group, own) in enumerate(zip(groups, given, strict=True))
        for name, key in zip(own or (), group["params"], strict=True)
    }
    return {
        **state_dict,
        "param_groups": [
            _group_of([(name, *places[name]) for name in own], groups, number) for number, own in enumerate(names)
        ],
    }


def _names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a saved group's parameters; None if it does not tell."""
    params = group["params"]
    names = params if all(isinstance(key, str) for key in params) else group.get("param_names")
    return list(names) if names is not None and len(names) == len(params) else None


def _group_of(members: Sequence[tuple[str, int, Any]], groups: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """A group with these members: their names, the saved groups that they are from, and their keys."""
    sources: dict[int, str] = {}
    for name, source, _ in members:
        sources.setdefault(source, name)
    first, *others = [groups[source] for source in sources] or [groups[min(number, len(groups) - 1)]]
    for other, (source, name) in zip(others, list(sources.items())[1:], strict=True):
        for option in (option for option in first if option not in _NOT_OPTIONS):
            if first[option] != other.get(option):
                raise ValueError(
                    f"param group {number} has parameters of several groups of the state_dict, whose {option} differ: "
                    f"{first[option]!r} of {next(iter(sources.values()))} and {other.get(option)!r} of {name}, in "
                    f"group {source}; make the groups as they were"
                )
    return {**first, "params": [key for _, _, key in members], "param_names": [name for name, _, _ in members]}
