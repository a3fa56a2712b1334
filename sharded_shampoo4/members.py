"""The parameters that an optimizer was given, found again in whatever a host has put into its groups since.

Hosts leave parameters where they are (one process, DDP, FSDP1), replace each by another of the same shape (FSDP2, a
DTensor; DeepSpeed at stage 0 in low precision, a float32 copy), or put flat tensors in their place that hold parts of
many of them (ZeRO 1, 2, 3).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from .advice import Given
from .base_options import NOT_OF_SOAP
from .held import HeldParameter, Signature, describe_tensors
from .hosts import FlatTensor, Host, find_host
from .names import match_names, names_in, plain_name, plain_names
from .options import OPTION_NAMES, PreconditionerOptions
from .placement import check_shared, is_dtensor
from .planning.schedule import Phases, stagger
from .planning.views import matrix_view
from .recognition import Member, MemberGroup, Reference, is_trained, lasting_options, recognize, refer_to

_WATCHED = (*OPTION_NAMES, *NOT_OF_SOAP)  # options of groups that a step looks at again

_NO_PHASES: Mapping[tuple[int, str], Phases] = {}


class Members:
    """All parameters that an optimizer was given, by groups."""

    def __init__(self) -> None:
        self._given: list[MemberGroup] = []
        self._host: Host | None = None  # once it is known for good
        self._described: list[tuple[int, str, torch.Size, PreconditionerOptions]] = []
        self._schedule: Mapping[tuple[int, str], Phases] = {}  # of what is described
        self._version = 0  # of names, groups and host
        self.changes = 0  # how often other parameters than before were found in the groups
        self.replaced: list[tuple[weakref.ReferenceType[Tensor], Member]] = []  # since they were last looked at

    def add(self, group: dict[str, Any]) -> None:
        """Remember the parameters of a new group."""
        params, index = group["params"], len(self._given)
        named = "param_names" in group
        names = group.get("param_names") or [f"parameter {place} of group {index}" for place in range(len(params))]
        host, members = self._host or find_host(None, params), []
        for name, parameter in zip(names, params, strict=True):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run the model once before the optimizer is made")
            reference, shape = self._refer_to(parameter), host.shape(parameter)
            members.append(Member(plain_name(name), named, reference, reference, shape, parameter.requires_grad))
        self._given.append(MemberGroup(group, members, lasting_options(group)))
        self._relabel()

    def remove(self, group: dict[str, Any]) -> None:
        """Forget a group that was refused."""
        self._given = [given for given in self._given if given.group is not group]
        self._relabel()

    def follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Find out what stands in ``groups``, all of the optimizer's, if it is not what stood there before.

        Parameters are known by identity, in whatever group, place or dictionary they are. Those that a host has put in
        their places are known by their order and shapes. What is in no group any more is forgotten. Under ZeRO 1, 2
        and 3, whose flat tensors the groups hold, nothing changes.

        Raises:
            ValueError: parameters that were not given, or cannot be recognised.
        """
        same = len(groups) == len(self._given) and all(
            given.group is group and given.is_in_place(group["params"])
            for given, group in zip(self._given, groups, strict=True)
        )
        if same or self.partitioned:
            return
        known = self._by_tensor()
        standing = {id(known[parameter]) for group in groups for parameter in group["params"] if parameter in known}
        found: list[MemberGroup] = []
        held: list[tuple[Member, Tensor]] = []
        for number, group in enumerate(groups):
            before = self._before(group, number, len(groups), known)
            members = recognize(group["params"], number, before, known, standing)
            held += zip(members, group["params"], strict=True)
            options = lasting_options(group) if before is None else before.options
            found.append(MemberGroup(group, members, options))
        if len({id(member) for member, _ in held}) < len(held):
            raise ValueError("a parameter stands in the param groups twice")
        for member, parameter in held:
            before_it = member.held()
            if before_it is not None and before_it is not parameter:
                self.replaced.append((weakref.ref(before_it), member))
                member.given = weakref.ref(before_it) if member.given() is before_it else member.given
            member.held = self._refer_to(parameter)
        self._given = found
        self.changes += 1
        self._relabel()
        self._write_names()

    def _refer_to(self, parameter: Tensor) -> Reference:
        return refer_to(parameter, stays=self._host is not None or is_dtensor(parameter))

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over new dictionaries of the same groups, as ``Optimizer.load_state_dict`` makes them."""
        for given, group in zip(self._kept(len(groups)), groups, strict=True):
            given.group, given.options = group, lasting_options(group)
        self._version += 1
        self._write_names()

    def _kept(self, count: int) -> list[MemberGroup]:
        """The groups if ``count`` of them are left: DeepSpeed drops empty ones."""
        return self._given if count == len(self._given) else [given for given in self._given if given.members]

    def shapes(self, count: int) -> list[list[tuple[str, torch.Size]]]:
        """Names and whole shapes of all parameters as they were given, by the ``count`` groups that are left."""
        return [[(member.label, member.shape) for member in given.members] for given in self._kept(count)]

    def _by_tensor(self) -> dict[Tensor, Member]:
        """Every parameter that was given, or has replaced one."""
        found: dict[Tensor, Member] = {}
        for given in self._given:
            for member in given.members:
                for parameter in (member.given(), member.held()):
                    if parameter is not None:
                        found[parameter] = member
        return found

    def _before(
        self, group: dict[str, Any], number: int, count: int, known: Mapping[Tensor, Member]
    ) -> MemberGroup | None:
        """What ``group``, or the one that it stands for, was: the same dictionary, or one with the same parameters."""
        members = [known[parameter] for parameter in group["params"] if parameter in known]
        for given in self._given:
            if given.group is group or (members and any(member is members[0] for member in given.members)):
                return given
        return self._given[number] if count == len(self._given) else None

    def _relabel(self) -> None:
        self._version += 1
        members = [member for given in self._given for member in given.members]
        counts = Counter(member.name for member in members)
        seen: Counter[str] = Counter()
        for number, given in enumerate(self._given):
            for member in given.members:
                member.label = member.name
                if counts[member.name] > 1:
                    seen[member.name] += 1
                    member.label = f"{member.name} ({seen[member.name]} of {counts[member.name]}, group {number})"

    def _write_names(self) -> None:
        """Have torch's own list of names in each group be that of the parameters in it."""
        for given in self._given:
            if self.partitioned:
                continue
            if given.members and all(member.named for member in given.members):
                given.group["param_names"] = [member.name for member in given.members]
            else:
                given.group.pop("param_names", None)

    @property
    def host(self) -> Host:
        """Who arranges the parameters: found anew until the first step, since it may come after the optimizer."""
        return self._host or find_host(None, self._tensors())

    def use_host(self, host: Host) -> None:
        """Take ``host`` from now on, and from it whole shapes, and names of parameters that were given without."""
        self._host = host
        names = host.names()
        for given in self._given:
            for member in given.members:
                parameter = member.given()
                if parameter is not None:
                    member.shape = host.shape(parameter)
                    if not member.named and parameter in names:
                        member.name = plain_name(names[parameter])
            if given.is_in_place(given.group["params"]):
                for member, standing in zip(given.members, given.group["params"], strict=True):
                    was_given = member.given() is standing
                    member.held = self._refer_to(standing)
                    member.given = member.held if was_given else member.given
        self._relabel()

    def find_host(self, optimizer: Optimizer) -> None:
        """Look for the host at the first step, when it is known which framework calls ``optimizer``, if any."""
        if self._host is None:
            self.use_host(find_host(optimizer, self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [parameter for given in self._given for parameter in given.parameters()]

    @property
    def partitioned(self) -> bool:
        """Whether flat tensors stand in the groups, as under ZeRO 1, 2 and 3."""
        host = self.host
        return any(
            host.has_flat_tensors(given.parameters()) and not given.is_in_place(given.group["params"])
            for given in self._given
        )

    def name_by(self, model: Any, anew: bool = False) -> None:
        """Take from ``model``, wrapped as it is, which parts of names are wrappers', and names that are missing.

        ``anew``: names that were given are replaced too.
        """
        names = names_in(model)
        for given in self._given:
            for member in given.members:
                plain = next((names[p] for p in (member.held(), member.given()) if p is not None and p in names), None)
                if plain is None:
                    continue
                if anew or not member.named:
                    member.name = plain
                if member.name == plain or match_names([member.name], [plain]):
                    member.plain = plain
        self._relabel()

    def check(self, entries: Sequence[HeldParameter], chosen: Any) -> None:
        """Raise ValueError if the host runs with what was not tested, or other ranks than ``chosen`` share parameters.

        ``chosen`` is the optimizer's ``process_group``.
        """
        self.host.check(chosen, entries[0].name if entries else "the parameters")
        for entry in entries:
            check_shared(entry.name, entry.parameter, chosen)

    def check_own_options(self) -> None:
        """Raise ValueError if a group that had options of its own has those of the first group now.

        DeepSpeed 0.19.8 does that when it loads a universal checkpoint at stage 3.
        """
        first, *others = self._given
        for number, given in enumerate(others, 1):
            for name, value in given.options.items():
                taken = first.group.get(name)
                if value != first.options.get(name) and value != taken and given.group.get(name) == taken:
                    raise ValueError(
                        f"{name} of param group {number} was {value!r} and is {taken!r} after loading, as in the first "
                        "group: DeepSpeed's universal checkpoint does that at stage 3; set it again after "
                        "load_checkpoint()"
                    )

    def has_matrix(self) -> bool:
        """Whether there is anything to precondition at all."""
        host = self.host
        return any(
            parameter is not None and matrix_view(name, host.shape(parameter), options) is not None
            for name, parameter, options in self.given()
        )

    def given(self) -> list[tuple[str, Tensor | None, PreconditionerOptions]]:
        """Name, options and, where it still exists, tensor of every parameter, as they were given."""
        return [
            (member.label, member.given(), PreconditionerOptions.of_group(given.group))
            for given in self._given
            for member in given.members
        ]

    def trained(self) -> list[Given]:
        """Every parameter that is not frozen."""
        found = []
        for given in self._given:
            options = PreconditionerOptions.of_group(given.group)
            alive = [p for p in given.parameters() if p.requires_grad]
            itemsize = alive[0].itemsize if alive else 4
            found += [Given(name, shape, itemsize, options) for name, shape in given.trained_shapes(now=True)]
        return found

    def schedule(self) -> Mapping[tuple[int, str], Phases]:
        """The phases of every parameter's factors, by group and name; the same object as long as nothing has changed.

        They follow from all that was given and is not frozen, whatever part of it a step is about.
        """
        by_group = [PreconditionerOptions.of_group(given.group) for given in self._given]
        if not any(options.refresh == "staggered" for options in by_group):
            return _NO_PHASES
        now = not self.partitioned  # a flat tensor does not tell what of it is frozen
        described = [
            (number, name, shape, options)
            for number, (given, options) in enumerate(zip(self._given, by_group, strict=True))
            for name, shape in given.trained_shapes(now)
        ]
        if described != self._described:
            views = {(number, name): (matrix_view(name, shape, o), o) for number, name, shape, o in described}
            matrices = {key: (view, options) for key, (view, options) in views.items() if view}
            self._described = described
            self._schedule = dict(zip(matrices, stagger(list(matrices.values())), strict=True))
        return self._schedule

    def entries(self, groups: Sequence[dict[str, Any]]) -> list[HeldParameter]:
        """What ``groups``, all of the optimizer's or some, hold now.

        Raises:
            ValueError: parameters cannot be recognised in what stands there.
        """
        self.follow(groups)
        return [entry for group in groups for entry in self._entries(group)]

    def calls(self, groups: Sequence[dict[str, Any]]) -> list[list[HeldParameter]]:
        """What each of the calls of ``step()`` that make one optimizer step is about, in their order."""
        if not self.partitioned:
            return [self.entries(groups)]
        host = self.host
        by_key: dict[Hashable, list[HeldParameter]] = {}
        for number, given in enumerate(self._given):
            options = PreconditionerOptions.of_group(given.group)
            for flat in host.flat_tensors(number, given.group["params"], given.parameters()):
                by_key.setdefault(flat.call, []).extend(self._entries_in(flat, number, options))
        calls = [by_key[key] for key in sorted(by_key, key=_number)]
        return [[entry for call in calls for entry in call]] if host.steps_once else calls

    def signature(self, groups: Sequence[dict[str, Any]]) -> Signature:
        """All that decides what :meth:`entries` gives, and how these are preconditioned, as cheaply as possible."""
        tensors = describe_tensors(groups)
        options = [[given.group.get(name) for name in _WATCHED] for given in self._given]
        options += [[id(group), len(group["params"])] for group in groups]
        first = tensors[0][0] if tensors else 0
        return Signature(first, tensors, options, self._version)

    def group(self, number: int) -> dict[str, Any]:
        """A group, by its number."""
        return self._given[number].group

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All groups, by their numbers."""
        return [given.group for given in self._given]

    def plain_names(self) -> dict[str, str]:
        """What portable checkpoints call each parameter: its name without what wrappers put into it.

        By the names of its :class:`HeldParameter`.

        Raises:
            ValueError: a parameter has no name, or two have the same.
        """
        members = [member for given in self._given for member in given.members]
        for member in members:
            if not member.named and member.plain is None and self.host.engine is None:
                raise ValueError(
                    f"a portable checkpoint needs names, but {member.name} was given without: make the optimizer of "
                    "model.named_parameters() (in groups: {'params': [(name, parameter), ...]}), or give model="
                )
        read = dict(zip((m.label for m in members), plain_names([m.name for m in members]), strict=True))
        names = {member.label: member.plain or read[member.label] for member in members}
        taken: set[str] = set()
        for name in names.values():
            if name in taken:
                raise ValueError(f"two parameters have the name {name}")
            taken.add(name)
        return names

    def names(self) -> list[list[str]] | None:
        """The names of what stands in each group; None unless all have one. Not under ZeRO 1, 2 and 3."""
        if not all(member.named for given in self._given for member in given.members):
            return None
        return [[member.name for member in given.members] for given in self._given]

    def _entries(self, group: dict[str, Any]) -> Iterator[HeldParameter]:
        params: list[Tensor] = group["params"]
        if not params:
            return
        number = next((index for index, given in enumerate(self._given) if given.group is group), None)
        if number is None:
            raise ValueError("a param group is none of those that Shampoo4 was given: use add_param_group()")
        given, host = self._given[number], self.host
        options = PreconditionerOptions.of_group(group)
        if given.is_in_place(params):
            for member, parameter in zip(given.members, params, strict=True):
                shape, trained = host.shape(parameter), is_trained(parameter)
                yield HeldParameter(member.label, parameter, options, shape, parameter, False, trained, number, host)
            return
        flats = {id(flat.tensor): flat for flat in host.flat_tensors(number, params, given.parameters())}
        for parameter in params:
            if id(parameter) not in flats:
                raise ValueError(
                    f"param group {number} has a tensor of shape {tuple(parameter.shape)} that is none of its "
                    "parameters and, for all that is known, holds none of them"
                )
            yield from self._entries_in(flats[id(parameter)], number, options)

    def _entries_in(self, flat: FlatTensor, number: int, options: PreconditionerOptions) -> Iterator[HeldParameter]:
        """The parameters in a flat tensor."""
        host = self.host
        names = {member.given(): member.label for member in self._given[number].members}
        for parameter in flat.parameters:
            shape = host.shape(parameter)
            if parameter not in names:
                raise ValueError(f"a flat tensor of param group {number} has a parameter of another group: {shape}")
            yield HeldParameter(
                names[parameter], parameter, options, shape, flat.tensor, True, True, number, host, flat.call
            )


def _number(key: Hashable) -> tuple[int, ...]:
    return (key,) if isinstance(key, int) else (key[1],)  # type: ignore[index]
