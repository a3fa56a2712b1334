"""Finds the distributor of the parameters that a step is about, and keeps all distributors of an optimizer.

One ``step()`` call is usually about all parameters. DeepSpeed's ZeRO calls it once for each of its flat tensors: then
there is a distributor for each, made by the first call, and the owners of its blocks are those ranks that have least
to do by the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from . import packing
from .agreement import check_groups
from .base_options import refuse_ignored
from .checks import (
    check_something_is_left,
    refuse_shared_gradients,
    separate_step_counts,
    warn_if_lost,
    without_gradients,
)
from .comm.groups import leave_word
from .comm.ranks import DeferredErrors, Ranks, has_waited
from .distributor import Distributor
from .held import HeldParameter, Signature
from .hosts import Host, reshard
from .marks import Marks
from .members import Members
from .numerics.matrix import Matrix
from .numerics.preconditioner import worse
from .options import PreconditionerOptions
from .placeholders import refuse_freed
from .placement import process_group
from .planning.loads import Work
from .planning.schedule import Phases
from .state_dict import Loaded
from .updates import Updates


class _Seen(NamedTuple):
    """What a step found. As long as the signature stays the same, it need not be looked for again."""

    signature: Signature
    entries: list[HeldParameter]
    distributor: Distributor
    updates: Updates


class Session:
    """All distributors of an optimizer, and the factors of parameters that no distributor has (yet).

    Args:
        members: the optimizer's parameters.
        base: name of the base optimizer.
        chosen: the optimizer's ``process_group``, as it was given.

    Attributes:
        loaded: factors that were loaded or set aside, by their parameters, which no distributor has now.
        last: distributor of the last step.
        updates: who steps on what in the last step.
        marks: of factors, in ``optimizer.state``.
    """

    def __init__(self, members: Members, base: str, chosen: Any = None) -> None:
        self.members = members
        self.base = base
        self.chosen = chosen
        self.ranks: Ranks | None = None
        self.loaded: dict[Tensor, Loaded] = {}
        self.last: Distributor | None = None
        self.updates = Updates([])
        self._has_left_word = False
        self._by_key: dict[tuple[Hashable, ...], Distributor] = {}
        self._seen: dict[int, _Seen] = {}  # by the first tensor in a call, what was found in its last step
        self._changes = 0  # of the members, that were seen
        self.marks = Marks()

    def all(self) -> Iterable[Distributor]:
        """Every distributor."""
        return self._by_key.values()

    @property
    def spread(self) -> bool:
        """Whether factors are spread over several ranks."""
        return bool(self._by_key) and self.ranks is not None and self.ranks.size > 1

    def begin(self, calling: str) -> None:
        """Begin a call that is collective where factors are spread over ranks."""
        if self.ranks is not None and self.spread:
            if self.ranks.gone:
                self._start_again(self.members.groups, self.ranks)
            self.ranks.meet(calling)

    def use_host(self, host: Host) -> None:
        """Be told who arranges the parameters."""
        self.members.use_host(host)
        self.ranks, self._seen = None, {}

    def load(self, loaded: dict[Tensor, Loaded]) -> None:
        """Forget all factors, and take these instead."""
        self.loaded, self.last, self._by_key, self._seen = loaded, None, {}, {}
        self.marks = Marks()
        self.members.replaced.clear()

    # -- at a step -----------------------------------------------------------------------------------------------------

    def current(
        self,
        groups: Sequence[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        optimizer: Optimizer,
        error: Exception | None = None,
    ) -> Distributor:
        """Check this step's gradients, and give the distributor of the parameters that ``groups`` hold; collective.

        ``state`` are the base optimizer's states; ``optimizer`` is what the host calls; an ``error`` of this rank's is
        raised on every rank.
        """
        ranks = self._start(groups, optimizer, "step()")
        signature, seen, entries, updates = None, None, [], Updates([])
        try:
            signature = self.members.signature(groups)
            seen = self._seen.get(signature.first)
            if seen is None or seen.signature != signature:
                seen, entries = None, self._check_entries(groups, state)
                updates = Updates(entries)
        except Exception as found:
            error = error or found
        if seen is not None:
            self.last = self._agree(ranks, seen.entries, seen.distributor, False, state, error, stepping=True)
            self.updates = seen.updates
        else:
            self.last = self._find(ranks, entries, state, error, stepping=True)
            self.updates = updates
            if signature is not None:
                now = {first: seen for first, seen in self._seen.items() if seen.signature.version == signature.version}
                self._seen = {**now, signature.first: _Seen(signature, entries, self.last, updates)}
        return self.last

    def _check_entries(
        self, groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> list[HeldParameter]:
        """What ``groups`` hold now, with gradients that can be preconditioned."""
        entries = self.members.entries(groups)
        self.let_go(groups, state)
        for group in groups:
            refuse_ignored(PreconditionerOptions.of_group(group), group)
        for entry in entries:
            entry.check(entry.holder.grad)
        refuse_shared_gradients(entries)
        refuse_freed(entries)
        return entries

    def mark_stepped(self, state: MutableMapping[Tensor, Any]) -> None:
        """Put marks into ``state`` for the parameters that the base has just made a step with."""
        if self.last is not None:
            pairs = zip(self.last.parameters, self.last.holders, strict=True)
            self.marks.put(state, (p for p, holder in pairs if p is holder and p.grad is not None))

    def mark_loaded(self, state: MutableMapping[Tensor, Any]) -> None:
        """Put marks into ``state`` for the parameters whose states were loaded with their factors."""
        attached = [
            p
            for distributor in self.all()
            for p, holder, matrix in zip(distributor.parameters, distributor.holders, distributor.matrices, strict=True)
            if p is holder and (state.get(p) or (matrix.is_soap and matrix.step))
        ]
        loaded = [p for p, entry in self.loaded.items() if state.get(p) or entry.options.method == "soap"]
        self.marks = Marks()
        self.marks.put(state, [*attached, *loaded])

    def attach_all(
        self,
        groups: Sequence[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        optimizer: Optimizer,
        calling: str,
        model: Any = None,
    ) -> list[HeldParameter]:
        """Attach all parameters, between steps, as the calls of ``step()`` would do, and return them; collective.

        ``calling`` is the call in which that is done, for messages. ``model``, wrapped as it is, tells names that are
        missing and which parts of names are wrappers'.
        """
        ranks = self._start(groups, optimizer, calling)
        with ranks.together():
            self.members.follow(groups)
            if model is not None:
                if not isinstance(model, nn.Module):
                    raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
                reshard(model)
                self.members.name_by(model)
            calls = self.members.calls(groups)
            everything = [entry for call in calls for entry in call]
            for entry in everything:
                entry.check(None)
            refuse_freed(everything)
            self.let_go(groups, state)
        for entries in calls:
            self._find(ranks, entries, state, None)
        return everything

    def let_go(self, groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any]) -> None:
        """Forget the states of parameters that stand in no group any more.

        Raises:
            ValueError: a host has replaced a parameter that had states.
        """
        self.members.follow(groups)
        if self._changes == self.members.changes:
            return
        for reference, member in self.members.replaced:
            old = reference()
            if old is not None and (state.get(old) or old in self.loaded):
                raise ValueError(
                    f"{member.label} had states when a {type(member.held()).__name__} took its place in the param "
                    "groups: make or load them after the model is wrapped and the optimizer prepared"
                )
        self.members.replaced.clear()
        present = {parameter for group in groups for parameter in group["params"]}
        for states in (self.loaded, state):
            for parameter in [parameter for parameter in states if parameter not in present]:
                del states[parameter]
        self.marks.keep(present)
        self._changes = self.members.changes

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
        names = [name for name, _, _ in self.members.given()]
        return process_group([p for group in groups for p in group["params"]], self.chosen, names)

    def _start(self, groups: Sequence[dict[str, Any]], optimizer: Optimizer, calling: str) -> Ranks:
        if self.ranks is None:  # first of all: an error on one rank must reach the others
            self.ranks = Ranks(self.process_group(groups))
            self.ranks.calling = calling
            self.members.find_host(optimizer)
            check_groups(self.ranks, self.base, self.members.groups)
        elif self.ranks.gone:
            self._start_again(groups, self.ranks)
        self.ranks.calling = calling
        return self.ranks

    def _start_again(self, groups: Sequence[dict[str, Any]], ranks: Ranks) -> None:
        """Go on with a process group that was destroyed and made anew."""
        if self.chosen is not None:
            raise RuntimeError(
                "the group that process_group= was given was destroyed: save a checkpoint before that, and load it "
                "into an optimizer made with the new group"
            )
        ranks.renew(self.process_group(groups))

    def _find(
        self,
        ranks: Ranks,
        entries: list[HeldParameter],
        state: MutableMapping[Tensor, Any],
        error: Exception | None,
        stepping: bool = False,
    ) -> Distributor:
        """Give the distributor of ``entries``, made anew if they are not what they were; collective."""
        distributor = self._by_key.get(_key(entries))
        stale = False
        try:
            chosen, matrices = _matrices(entries, self.members.schedule())
            stale = distributor is None or not distributor.fits(
                [entry.parameter for entry in chosen], [entry.holder for entry in chosen], matrices
            )
            if distributor is not None and not stale:
                for known, matrix in zip(distributor.matrices, matrices, strict=True):
                    known.name = matrix.name
        except Exception as found:
            error = error or found
        return self._agree(ranks, entries, distributor, stale, state, error, stepping)

    def _agree(
        self,
        ranks: Ranks,
        entries: list[HeldParameter],
        distributor: Distributor | None,
        stale: bool,
        state: MutableMapping[Tensor, Any],
        error: Exception | None,
        stepping: bool,
    ) -> Distributor:
        """Ask all ranks whether ``distributor`` is right for this call, and mend or replace it if not; collective."""
        changed = False
        cleared: set[Tensor] = set()
        try:
            changed = distributor is not None and not stale and distributor.presence_changed()
            cleared = self.marks.missing(state)
        except Exception as found:
            error = error or found
        idle = stepping and all(entry.holder.grad is None for entry in entries)
        is_new = distributor is None
        failed, any_stale, any_changed, any_cleared, any_busy, any_new, any_known = ranks.any(
            [error is not None, stale, changed, bool(cleared), not idle, is_new, not is_new]
        )
        if failed:
            ranks.raise_together(error)
        if any_new and any_known:
            everyone = ranks.gather(is_new)
            loaded, other = everyone.index(True), everyone.index(False)
            raise ValueError(f"rank {loaded} has called load_state_dict(), unlike rank {other}: call it on every rank")
        if entries and not any_busy:
            raise RuntimeError(without_gradients(entries))
        if any_cleared:
            self._reset(ranks, entries, state, cleared)
        if any_stale:
            distributor = self._attach(ranks, entries, state)
        assert distributor is not None
        if any_stale or any_changed:
            distributor.agree_on_presence()
            distributor.check_replicas()
        return distributor

    def _attach(
        self,
        ranks: Ranks,
        entries: list[HeldParameter],
        state: MutableMapping[Tensor, Any],
    ) -> Distributor:
        """Make a distributor for parameters that have changed, and carry their factors over; collective."""
        key = _key(entries)
        old = self._by_key.get(key)
        places = {parameter: index for index, parameter in enumerate(old.parameters)} if old else {}
        self._seen = {}
        if old is not None:  # they were the same when it was made
            check_groups(ranks, self.base, self.members.groups)
        with ranks.together():
            chosen, matrices = _matrices(entries, self.members.schedule())
            self.members.check(entries, self.chosen)
            check_something_is_left(entries, matrices, self.members)
            for entry, matrix in zip(chosen, matrices, strict=True):
                if entry.parameter in self.loaded:
                    self.loaded[entry.parameter].check(matrix)
                elif old and entry.parameter in places:
                    packing.check_same_bytes(old.matrices[places[entry.parameter]], matrix)
                _ = entry.shard  # raises if there is no telling which elements this rank holds
            if old is None:
                warn_if_lost(chosen, state, self.members, self.loaded)
                separate_step_counts(entries, state)
        others = (distributor.plan.work for other, distributor in self._by_key.items() if other != key)
        distributor = Distributor(ranks, chosen, matrices, sum(others, Work()))
        packing.check_that_ranks_agree(ranks, {entry.name: self.loaded.get(entry.parameter) for entry in chosen})
        self._set_aside(ranks, old, entries, chosen)
        self.marks.hand_over(state, entries)
        errors = DeferredErrors(ranks)
        for index, (entry, matrix) in enumerate(zip(chosen, matrices, strict=True)):
            if entry.parameter in self.loaded:
                errors.attempt(packing.unpack, distributor, index, self.loaded.pop(entry.parameter).full(matrix, ranks))
            elif old is not None and entry.parameter in places:
                errors.attempt(packing.unpack, distributor, index, packing.pack(old, places[entry.parameter]))
        errors.raise_together()
        self._by_key[key] = distributor
        return distributor

    def _reset(
        self, ranks: Ranks, entries: Sequence[HeldParameter], state: Mapping[Tensor, Any], cleared: set[Tensor]
    ) -> None:
        """Reset the factors of parameters whose states were cleared; collective."""
        names = self.marks.agree_on_cleared(ranks, entries, state, cleared)
        for entry in entries:
            if entry.name in names:
                self.loaded.pop(entry.parameter, None)
        for distributor in self.all():
            for index, matrix in enumerate(distributor.matrices):
                if matrix.name in names:
                    distributor.reset(index)
        self.marks.parameters -= cleared

    def _set_aside(
        self, ranks: Ranks, old: Distributor | None, entries: Sequence[HeldParameter], chosen: Sequence[HeldParameter]
    ) -> None:
        """Keep the factors of parameters that are in the groups, but not preconditioned now; collective."""
        attached, standing = {entry.parameter for entry in chosen}, {entry.parameter for entry in entries}
        left = [parameter not in attached and parameter in standing for parameter in old.parameters] if old else []
        for place, leaves in enumerate(ranks.any(left) if left else ()):
            if leaves:
                assert old is not None
                packed = packing.PackedState(old.matrices[place].options, packing.pack(old, place))
                if left[place]:
                    self.loaded[old.parameters[place]] = packed

    # -- states --------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's factors."""
        attached = sum(distributor.preconditioner.nbytes for distributor in self.all())
        return attached + sum(entry.data.numel() for entry in self.loaded.values())

    def health(self) -> dict[str, list[float]]:
        """The worst of each matrix's factors on all ranks, in the order of HEALTH; collective."""
        worst: dict[str, list[float]] = {}
        self.begin("health()")
        for distributor in self.all():
            with distributor.ranks.together():
                mine = distributor.preconditioner.health()
            for found in distributor.ranks.gather(mine):
                for name, values in found.items():
                    worst[name] = worse(worst.get(name), values)
        return worst

    def owners(self) -> dict[Tensor, str]:
        """The ranks that own blocks of each parameter."""
        return {parameter: ranks for distributor in self.all() for parameter, ranks in distributor.owners().items()}


def _key(entries: Sequence[HeldParameter]) -> tuple[Hashable, ...]:
    return tuple(dict.fromkeys(entry.key for entry in entries if entry.flat))


def _matrices(
    entries: Sequence[HeldParameter], schedule: Mapping[tuple[int, str], Phases]
) -> tuple[list[HeldParameter], list[Matrix]]:
    """The parameters to precondition and their fresh matrices, in the order of the groups."""
    pairs = [(entry, entry.matrix(schedule)) for entry in entries]
    return (
        [entry for entry, matrix in pairs if matrix is not None],
        [matrix for _, matrix in pairs if matrix is not None],
    )
