"""Finds, at every step, the binding of the parameters that the step is about, and keeps the factors of all of them.

One ``step()`` call is usually about all parameters. DeepSpeed's ZeRO calls it once for each of its flat tensors: then
there is a binding for each, made by the first call, and the owners of its blocks are those ranks that have least to do
by the others.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import packing
from .binding import Binding, Candidate
from .groups import leave_word
from .integrations import fsdp, zero
from .layout import matrix_shape
from .members import Entry, Members
from .options import PreconditionerOptions
from .plan import Shard, Work
from .preconditioner import Matrix, worse
from .ranks import OWN_MODELS, Company, Ranks, has_waited
from .schedule import Phases

Unbound = packing.PackedState | packing.PackedPieces


class Bindings:
    """All bindings of an optimizer's ``members``, and the factors of parameters that are not bound (yet).

    ``base`` is the name of the base optimizer, ``chosen`` its ``process_group`` as it was given.
    """

    def __init__(self, members: Members, base: str, chosen: Any = None) -> None:
        self.members = members
        self.base = base
        self.chosen = chosen
        self.ranks: Ranks | None = None
        self.locations: dict[Tensor, fsdp.Location] = {}  # of parameters that cannot tell where they live
        self.unbound: dict[Tensor, Unbound] = {}
        self.last: Binding | None = None  # that of the last step
        self._has_left_word = False
        self._by_key: dict[tuple[Hashable, ...], Binding] = {}

    def all(self) -> Iterable[Binding]:
        """Every binding."""
        return self._by_key.values()

    @property
    def spread(self) -> bool:
        """Whether factors are spread over several ranks."""
        return bool(self._by_key) and self.ranks is not None and self.ranks.size > 1

    def locate(self, locations: Mapping[Tensor, fsdp.Location]) -> None:
        """Be told where parameters live that cannot tell it themselves (FSDP1)."""
        self.locations = dict(locations)
        self.ranks = None

    def load(self, unbound: dict[Tensor, Unbound]) -> None:
        """Forget all factors, and take these instead."""
        self.unbound, self.last, self._by_key = unbound, None, {}

    # -- at a step -----------------------------------------------------------------------------------------------------

    def bind(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any], engine: Any, error: Exception | None = None
    ) -> Binding:
        """Check this step's gradients, and give the binding of the parameters in ``groups`` as they are; collective.

        ``state`` are the base optimizer's states; ``engine`` is DeepSpeed's, if one is calling; an ``error`` of this
        rank's is raised on every rank.
        """
        ranks = self._meet(groups, engine, "step()")
        entries: list[Entry] = []
        try:
            entries = self.members.entries(groups, self.locations)
            for entry in entries:
                _check_gradient(entry.name, entry.holder.grad)
        except Exception as found:
            error = error or found
        self.last = self._bind_entries(ranks, entries, state, error)
        return self.last

    def bind_all(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any], engine: Any, calling: str
    ) -> None:
        """Bind all parameters, between steps, as the calls of ``step()`` would do; collective.

        ``calling`` is the call in which that is done, for messages.
        """
        ranks = self._meet(groups, engine, calling)
        with ranks.together():
            calls = self.members.calls(groups, self.locations)
        for entries in calls:
            self._bind_entries(ranks, entries, state, None)

    def everything(self, groups: Sequence[dict[str, Any]]) -> list[tuple[Entry, fsdp.Location, int]]:
        """All parameters that are trained, their intervals on this rank, and where these begin in their holders."""
        entries = [entry for call in self.members.calls(groups, self.locations) for entry in call if entry.trained]
        return [(entry, *entry.locate(self.locations, self.members.engine)) for entry in entries]

    @contextlib.contextmanager
    def leaving_word(self, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Leave word of what is raised in here for the other ranks, which may be waiting for this one."""
        if self._has_left_word:
            self._leave_word(groups, "")
        try:
            yield
        except BaseException as error:
            if not has_waited(error):
                self._leave_word(groups, f"{type(error).__name__}: {error}".rstrip(": "))
            raise

    def _leave_word(self, groups: Sequence[dict[str, Any]], text: str) -> None:
        self._has_left_word = bool(text)
        with contextlib.suppress(Exception):
            leave_word(self.process_group(groups), text)

    def process_group(self, groups: Sequence[dict[str, Any]]) -> Any:
        """The ranks that hold the parameters in ``groups`` between them; None: this process alone."""
        if self.ranks is not None and not self.ranks.gone:
            return self.ranks.group
        return fsdp.process_group([p for group in groups for p in group["params"]], self.chosen)

    def _meet(self, groups: Sequence[dict[str, Any]], engine: Any, calling: str) -> Ranks:
        if self.ranks is None:  # first of all: an error on one rank must reach the others
            self.ranks = Ranks(self.process_group(groups))
            self.ranks.calling = calling
            self.members.meet(engine)
            self._check_that_groups_agree(self.ranks)
        elif self.ranks.gone:
            self._meet_again(groups, self.ranks)
        self.ranks.calling = calling
        return self.ranks

    def _meet_again(self, groups: Sequence[dict[str, Any]], ranks: Ranks) -> None:
        """Go on with a process group that was destroyed and made anew."""
        if self.chosen is not None:
            raise RuntimeError(
                "the group that process_group= was given was destroyed: save a checkpoint before that, and load it "
                "into an optimizer made with the new group"
            )
        ranks.renew(self.process_group(groups))

    def _check_that_groups_agree(self, ranks: Ranks) -> None:
        """Raise ValueError, on every rank alike, unless all of them have the same base optimizer and its options."""
        described = [{"base": self.base, **_base_options(group)} for group in self.members.groups]
        first, *others = ranks.gather(described)
        for rank, groups in enumerate(others, 1):
            if len(groups) != len(first):
                found = f"{len(first)} param groups on rank 0 and {len(groups)} on rank {rank}"
                raise ValueError(f"there are {found}; {OWN_MODELS}")
            for number, (group, other) in enumerate(zip(first, groups, strict=True)):
                for option in {**group, **other}:  # in the same order on every rank
                    value, another = group.get(option), other.get(option)
                    if value != another:
                        found = f"{value!r} on rank 0 and {another!r} on rank {rank}"
                        raise ValueError(f"{option} of param group {number} is {found}; {OWN_MODELS}")

    def _bind_entries(
        self, ranks: Ranks, entries: list[Entry], state: Mapping[Tensor, Any], error: Exception | None
    ) -> Binding:
        chosen: list[Entry] = []
        matrices: list[Matrix] = []
        binding = self._by_key.get(_key(entries))
        stale = changed = False
        try:
            chosen, matrices = _matrices(entries, self.members.schedule(self.locations))
            stale = binding is None or not binding.fits(
                [entry.parameter for entry in chosen], [entry.holder for entry in chosen], matrices
            )
            changed = binding is not None and not stale and binding.presence_changed()
        except Exception as found:
            error = error or found
        failed, any_stale, any_changed = ranks.any([error is not None, stale, changed])
        if failed:
            ranks.raise_together(error)
        if any_stale:
            binding = self._rebind(ranks, entries, chosen, matrices, state)
        assert binding is not None
        if any_stale or any_changed:
            binding.agree_on_presence()
            binding.check_replicas()
        return binding

    def _rebind(
        self,
        ranks: Ranks,
        entries: list[Entry],
        chosen: list[Entry],
        matrices: list[Matrix],
        state: Mapping[Tensor, Any],
    ) -> Binding:
        """Bind parameters that have changed, and carry their factors over."""
        key = _key(entries)
        old = self._by_key.get(key)
        places = {parameter: index for index, parameter in enumerate(old.parameters)} if old else {}
        candidates: list[Candidate] = []
        with ranks.together():
            self.members.refuse_untested()
            self.members.check_shared(entries, self.chosen)
            self._refuse_unbound(entries)
            self._check_that_something_is_left(entries, matrices)
            for entry, matrix in zip(chosen, matrices, strict=True):
                if entry.parameter in self.unbound:
                    self.unbound[entry.parameter].check(matrix)
                elif old and entry.parameter in places:
                    packing.check_same_bytes(old.matrices[places[entry.parameter]], matrix)
                location, offset = entry.locate(self.locations, self.members.engine)
                shard = Shard(location.start, location.stop, location.replica)
                candidates.append(Candidate(entry.parameter, matrix, shard, entry.holder, offset))
            if old is None:
                self._warn_if_lost(chosen, state)
                _separate_step_counts(entries, state)
        others = (binding.plan.work for other, binding in self._by_key.items() if other != key)
        binding = Binding(ranks, candidates, sum(others, Work()))
        packing.check_that_ranks_agree(ranks, {entry.name: self.unbound.get(entry.parameter) for entry in chosen})
        kept = {entry.parameter for entry in chosen}
        for parameter, place in places.items():
            if parameter not in kept:
                assert old is not None
                self.unbound[parameter] = packing.PackedState(old.matrices[place].options, old.pack(place))
        company = Company(ranks)
        for index, (entry, matrix) in enumerate(zip(chosen, matrices, strict=True)):
            if entry.parameter in self.unbound:
                company.attempt(binding.unpack, index, self.unbound.pop(entry.parameter).full(matrix, ranks))
            elif old is not None and entry.parameter in places:
                company.attempt(binding.unpack, index, old.pack(places[entry.parameter]))
        company.part()
        self._by_key[key] = binding
        return binding

    def _refuse_unbound(self, entries: list[Entry]) -> None:
        """Raise ValueError for parameters of FSDP1 that nobody has told about: they look like vectors."""
        for entry in entries:
            if entry.options.precondition and entry.parameter not in self.locations:
                fsdp.refuse_unbound(entry.name, entry.parameter)

    def _check_that_something_is_left(self, entries: list[Entry], matrices: list[Matrix]) -> None:
        """Nothing may become the base optimizer in silence."""
        if matrices or not any(entry.options.precondition for entry in entries):
            return
        if not any(entry.flat for entry in entries):
            message = "Shampoo4 has no matrix to precondition: only the base optimizer is at work"
            warnings.warn(message, stacklevel=5)
        elif not self.members.has_matrix():
            raise ValueError("Shampoo4 finds no matrix to precondition in what ZeRO has made of the parameters")

    def _warn_if_lost(self, chosen: list[Entry], state: Mapping[Tensor, Any]) -> None:
        """Say so if the base goes on where the factors begin: DeepSpeed's universal checkpoint knows no factors."""
        resumed = [e.name for e in chosen if e.flat and _steps(state, e.holder) and e.parameter not in self.unbound]
        if resumed:
            self.members.check_own_options()
            warnings.warn(
                f"the base optimizer's states of {', '.join(resumed[:3])}{', ...' if len(resumed) > 3 else ''} were "
                "loaded without preconditioners (as from DeepSpeed's universal checkpoint): the factors start anew, "
                "and directions are plain gradients until the next root step",
                stacklevel=5,
            )

    # -- states --------------------------------------------------------------------------------------------------------

    def packed(self) -> dict[Tensor, Tensor]:
        """Every preconditioner there is, as bytes; on several ranks collective, and sharded where parameters are."""
        packed: dict[Tensor, Tensor] = {}
        company = Company(self.ranks) if self.ranks is not None else None
        for binding in self.all():
            assert company is not None
            for index, parameter in enumerate(binding.parameters):
                part = company.attempt(fsdp.shard_vector, binding.pack(index), parameter)
                if part is not None:
                    packed[parameter] = part
        if company is not None:
            company.part()
        for parameter, entry in self.unbound.items():
            packed[parameter] = entry.data
        return packed

    def pieces(self) -> dict[int, dict[str, Any]]:
        """This rank's part of every preconditioner there is, by the place of the parameter among those given."""
        found: dict[Tensor, Unbound] = dict(self.unbound)
        for binding in self.all():
            found.update({parameter: binding.pieces(index) for index, parameter in enumerate(binding.parameters)})
        places = {parameter: place for place, (_, parameter, _) in enumerate(self.members.given())}
        pieces = {places[parameter]: entry for parameter, entry in found.items()}
        return {
            place: entry.as_plain()
            for place, entry in sorted(pieces.items())
            if isinstance(entry, packing.PackedPieces)
        }

    def of_pieces(self, stored: Mapping[int, Mapping[str, Any]]) -> dict[Tensor, Unbound]:
        """Undo :meth:`pieces`. Raises ValueError unless they are of these parameters, with options that fit."""
        given = self.members.given()
        unbound: dict[Tensor, Unbound] = {}
        for place, plain in stored.items():
            name, parameter, options = given[place] if place < len(given) else ("", None, None)
            if parameter is None or options is None:
                raise ValueError(f"the state_dict has a preconditioner of parameter {place}, which is not there")
            piece = packing.PackedPieces.of_plain(options, plain)
            shape = matrix_shape(zero.whole_shape(parameter))
            if not options.precondition or shape is None:
                raise ValueError(f"the state_dict has a preconditioner of {name}, which is not preconditioned here")
            piece.check(Matrix(name, shape, options, piece.data.device))
            unbound[parameter] = piece
        return unbound

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's factors."""
        bound = sum(binding.preconditioner.nbytes for binding in self.all())
        return bound + sum(entry.data.numel() for entry in self.unbound.values())

    def health(self) -> dict[str, list[float]]:
        """The worst of each matrix's factors on all ranks, in the order of HEALTH; collective."""
        worst: dict[str, list[float]] = {}
        if self.ranks is not None and self.spread:
            self.ranks.meet("health()")
        for binding in self.all():
            with binding.ranks.together():
                mine = binding.preconditioner.health()
            for found in binding.ranks.gather(mine):
                for name, values in found.items():
                    worst[name] = worse(worst.get(name), values)
        return worst

    def owners(self) -> dict[Tensor, str]:
        """The ranks that own blocks of each parameter."""
        return {parameter: ranks for binding in self.all() for parameter, ranks in binding.owners().items()}


def _base_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a group that are not about the preconditioner, as plain values."""
    own = {field.name for field in fields(PreconditionerOptions)} | {"params", "param_names"}
    plain = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items() if k not in own}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, tuple))}


def _key(entries: Sequence[Entry]) -> tuple[Hashable, ...]:
    return tuple(dict.fromkeys(entry.key for entry in entries if entry.flat))


def _matrices(entries: Sequence[Entry], schedule: Mapping[tuple[int, str], Phases]) -> tuple[list[Entry], list[Matrix]]:
    """The parameters to precondition and their fresh matrices, in the order of the groups."""
    pairs = [(entry, entry.matrix(schedule)) for entry in entries]
    return (
        [entry for entry, matrix in pairs if matrix is not None],
        [matrix for _, matrix in pairs if matrix is not None],
    )


def _separate_step_counts(entries: Sequence[Entry], state: Mapping[Tensor, Any]) -> None:
    """Give every flat tensor its own count of steps.

    DeepSpeed 0.19.8 gives all sub-groups the same tensor when it loads a universal checkpoint at stage 3: it would be
    counted up by each of them.
    """
    for holder in {entry.holder for entry in entries if entry.flat}:
        own = state.get(holder, {})
        if isinstance(own.get("step"), Tensor):
            own["step"] = own["step"].clone()


def _steps(state: Mapping[Tensor, Any], holder: Tensor) -> float:
    """Steps that the base optimizer has made with ``holder``, as far as it says."""
    steps = state.get(holder, {}).get("step", 0)
    return float(steps)


def _check_gradient(name: str, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise TypeError(f"the gradient of {name} is sparse ({gradient.layout}): Shampoo4 needs dense gradients")
    if not gradient.is_floating_point():
        raise TypeError(f"the gradient of {name} is of type {gradient.dtype}: Shampoo4 needs real floating-point ones")
