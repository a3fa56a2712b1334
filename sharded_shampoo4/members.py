"""The parameters that an optimizer was given, found again in whatever a host has put into its groups since.

Hosts leave parameters where they are (one process, DDP, FSDP1), replace each by another of the same shape (FSDP2, a
DTensor; DeepSpeed at stage 0 in low precision, a float32 copy), or put flat tensors in their place that hold parts of
many of them (ZeRO 1, 2, 3).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .advice import Given
from .integrations import fsdp, zero
from .layout import matrix_shape
from .options import PreconditionerOptions
from .preconditioner import Matrix
from .schedule import Phases, stagger

_TOGETHER: Phases = {}
_NO_PHASES: Mapping[tuple[int, str], Phases] = {}


@dataclass(frozen=True)
class Entry:
    """A parameter that takes part in a step.

    Attributes:
        name: for messages.
        parameter: in the group; the one that was given, where the group has a flat tensor instead.
        options: of its group.
        shape: of the whole parameter.
        holder: what stands in the group: its gradient holds this rank's elements.
        flat: whether the holder is a flat tensor with parts of several parameters.
        trained: whether it takes part in the training.
        group: number of the group that it was given in.
        key: equal for all parameters that ``step()`` is given together, and on every rank.
        computes: where its gradient is preconditioned, if that is not where it is.
    """

    name: str
    parameter: Tensor
    options: PreconditionerOptions
    shape: torch.Size
    holder: Tensor
    flat: bool
    trained: bool
    group: int
    key: Hashable = None
    computes: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where its gradient is preconditioned."""
        if self.computes is not None:
            return self.computes
        device: torch.device = zero.compute_device(self.holder) if self.flat else fsdp.compute_device(self.holder)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """In what its direction is computed."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def view(self) -> tuple[int, int] | None:
        """Rows and columns of its matrix; None if it is not preconditioned."""
        return matrix_shape(self.shape) if self.options.precondition and self.trained else None

    def matrix(self, schedule: Mapping[tuple[int, str], Phases]) -> Matrix | None:
        """Its matrix, with fresh factors that are due as ``schedule`` says; None if it is not preconditioned."""
        shape = self.view
        if shape is None:
            return None
        phases = schedule.get((self.group, self.name), _TOGETHER)
        return Matrix(self.name, shape, self.options, self.device, self.dtype, phases=phases)

    def locate(self, bound: Mapping[Tensor, fsdp.Location], engine: Any) -> tuple[fsdp.Location, int]:
        """The interval that this rank holds, and where it begins in the flattened holder."""
        if self.flat:
            location, offset = zero.locate(self.name, self.parameter, self.holder, engine)
            return location, offset
        return fsdp.locate(self.name, self.parameter, bound), 0


@dataclass
class _Given:
    """One group as it was given. The references are weak: hosts that replace parameters want the old ones freed."""

    group: dict[str, Any]
    names: list[str]
    named: bool
    references: list[weakref.ReferenceType[Tensor]]
    shapes: list[torch.Size]
    trained: list[bool]
    options: dict[str, Any]  # as they were, but for those that change all the time

    def parameters(self) -> list[Tensor]:
        """Those that are still there."""
        return [parameter for parameter in (reference() for reference in self.references) if parameter is not None]

    def trained_shapes(self, bound: Mapping[Tensor, fsdp.Location]) -> Iterator[tuple[str, torch.Size]]:
        """Names and whole shapes of those that were to be trained when they were given."""
        for name, reference, shape, trained in zip(self.names, self.references, self.shapes, self.trained, strict=True):
            parameter = reference()
            if trained:
                yield name, bound[parameter].shape if parameter is not None and parameter in bound else shape

    def is_in_place(self, params: Sequence[Tensor]) -> bool:
        return len(params) == len(self.references) and all(
            reference() is parameter for reference, parameter in zip(self.references, params, strict=True)
        )


class Members:
    """All parameters that an optimizer was given, by groups."""

    def __init__(self) -> None:
        self._given: list[_Given] = []
        self._engine: weakref.ReferenceType[Any] | None = None  # DeepSpeed's, if there is one
        self._described: list[tuple[int, str, torch.Size, PreconditionerOptions]] = []
        self._schedule: Mapping[tuple[int, str], Phases] = {}  # of what is described

    def add(self, group: dict[str, Any]) -> None:
        """Remember the parameters of a new group."""
        params, index = group["params"], len(self._given)
        names = group.get("param_names") or [f"parameter {place} of group {index}" for place in range(len(params))]
        shapes = [zero.whole_shape(parameter) for parameter in params]
        references = [weakref.ref(parameter) for parameter in params]
        trained = [parameter.requires_grad for parameter in params]
        self._given.append(
            _Given(group, list(names), "param_names" in group, references, shapes, trained, _lasting(group))
        )

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over new dictionaries of the same groups, as ``Optimizer.load_state_dict`` makes them."""
        kept = [given for given in self._given if given.references]  # DeepSpeed drops empty groups
        for given, group in zip(self._given if len(groups) == len(self._given) else kept, groups, strict=True):
            given.group, given.options = group, _lasting(group)

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO 1, 2 or 3 has put flat tensors into the groups."""
        return any(
            zero.is_partitioned(given.parameters()) and not given.is_in_place(given.group["params"])
            for given in self._given
        )

    def meet(self, engine: Any) -> None:
        """Take from DeepSpeed's ``engine`` the names of parameters that were given without; it may be None."""
        self._engine = None if engine is None else weakref.ref(engine)
        names: Mapping[Tensor, str] = getattr(engine, "param_names", {})
        for given in self._given:
            if not given.named:
                pairs = zip(given.references, given.names, strict=True)
                given.names = [names.get(reference(), name) for reference, name in pairs]  # type: ignore[arg-type]

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, or None."""
        return None if self._engine is None else self._engine()

    def refuse_untested(self) -> None:
        """Raise ValueError if DeepSpeed runs with a feature that was not tested."""
        if self.engine is not None:
            zero.refuse_untested(self.engine)
        elif self.partitioned:
            raise ValueError(
                "ZeRO has partitioned the parameters, but the optimizer is not called by a DeepSpeed engine: use "
                "engine.step(), and one engine for one optimizer"
            )

    def check_shared(self, entries: Sequence[Entry], chosen: Any) -> None:
        """Raise ValueError unless the ``chosen`` ranks (an optimizer's ``process_group``) share the parameters."""
        if chosen is not None and (self.engine is not None or self.partitioned):
            shown = repr(chosen) if isinstance(chosen, str) else "a group"
            raise ValueError(
                f"process_group is {shown}, but DeepSpeed shares {entries[0].name if entries else 'the parameters'} "
                "among all ranks: leave process_group out"
            )
        for entry in entries:
            fsdp.check_shared(entry.name, entry.parameter, chosen)

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
        return any(
            options.precondition and parameter is not None and matrix_shape(zero.whole_shape(parameter)) is not None
            for _, parameter, options in self.given()
        )

    def given(self) -> list[tuple[str, Tensor | None, PreconditionerOptions]]:
        """Name, options and, where it still exists, tensor of every parameter, as they were given."""
        return [
            (name, reference(), PreconditionerOptions.of_group(given.group))
            for given in self._given
            for name, reference in zip(given.names, given.references, strict=True)
        ]

    def trained(self, bound: Mapping[Tensor, fsdp.Location]) -> list[Given]:
        """Every parameter that was to be trained when it was given."""
        found = []
        for given in self._given:
            options = PreconditionerOptions.of_group(given.group)
            alive = [p for p in given.parameters() if p.requires_grad]
            itemsize = alive[0].itemsize if alive else 4
            found += [Given(name, shape, itemsize, options) for name, shape in given.trained_shapes(bound)]
        return found

    def schedule(self, bound: Mapping[Tensor, fsdp.Location]) -> Mapping[tuple[int, str], Phases]:
        """The phases of every parameter's factors, by group and name; the same object as long as nothing has changed.

        They follow from all that was given, whatever part of it a step is about.
        """
        by_group = [PreconditionerOptions.of_group(given.group) for given in self._given]
        if not any(options.refresh == "staggered" for options in by_group):
            return _NO_PHASES
        described = [
            (number, name, shape, options)
            for number, (given, options) in enumerate(zip(self._given, by_group, strict=True))
            for name, shape in given.trained_shapes(bound)
        ]
        if described != self._described:
            views = {(number, name): (matrix_shape(shape), options) for number, name, shape, options in described}
            matrices = {key: (view, options) for key, (view, options) in views.items() if view and options.precondition}
            self._described = described
            self._schedule = dict(zip(matrices, stagger(list(matrices.values())), strict=True))
        return self._schedule

    def entries(self, groups: Sequence[dict[str, Any]], bound: Mapping[Tensor, fsdp.Location]) -> list[Entry]:
        """What ``groups``, all of the optimizer's or some, hold now.

        ``bound`` tells the whole shapes of parameters that do not themselves.

        Raises:
            ValueError: parameters cannot be recognised in what stands there.
        """
        return [entry for group in groups for entry in self._entries(group, bound)]

    def calls(self, groups: Sequence[dict[str, Any]], bound: Mapping[Tensor, fsdp.Location]) -> list[list[Entry]]:
        """What each of the calls of ``step()`` that make one optimizer step is about, in their order."""
        if not self.partitioned:
            return [self.entries(groups, bound)]
        by_key: dict[Hashable, list[Entry]] = {}
        for number, given in enumerate(self._given):
            options = PreconditionerOptions.of_group(given.group)
            for flat in zero.flats(given.group["params"], given.parameters()):
                for entry in self._flat_entries([flat], number, options):
                    by_key.setdefault(entry.key, []).append(entry)
        calls = [by_key[key] for key in sorted(by_key, key=_number)]
        return [[entry for call in calls for entry in call]] if zero.steps_once(self.engine) else calls

    def group(self, number: int) -> dict[str, Any]:
        """A group, by its number."""
        return self._given[number].group

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All groups, by their numbers."""
        return [given.group for given in self._given]

    def check_named(self) -> None:
        """Raise ValueError unless every parameter has a name of its own."""
        names = [name for given in self._given for name in given.names]
        for given in self._given:
            if not given.named and self.engine is None and given.names:
                raise ValueError(
                    f"a portable checkpoint needs names, but {given.names[0]} was given without: make the optimizer of "
                    "model.named_parameters() (in groups: {'params': [(name, parameter), ...]})"
                )
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two parameters have the name {double}")

    def _entries(self, group: dict[str, Any], bound: Mapping[Tensor, fsdp.Location]) -> Iterator[Entry]:
        params: list[Tensor] = group["params"]
        if not params:
            return
        number = next((index for index, given in enumerate(self._given) if given.group is group), None)
        if number is None:
            raise ValueError("a param group is none of those that Shampoo4 was given: use add_param_group()")
        given = self._given[number]
        options = PreconditionerOptions.of_group(group)
        if given.is_in_place(params):
            names = given.names
        elif zero.is_partitioned(given.parameters()):
            yield from self._flat_entries(params, number, options)
            return
        else:
            names = self._names_of_replacements(params, number)
        for name, parameter in zip(names, params, strict=True):
            if zero.is_initialised_partitioned(parameter):
                raise ValueError(
                    f"{name} is partitioned by deepspeed.zero.Init, but the optimizer was not given to "
                    "deepspeed.initialize at stage 3"
                )
            trained = parameter.requires_grad or parameter.grad is not None
            told = bound.get(parameter)
            shape, computes = (told.shape, told.device) if told is not None else (parameter.shape, None)
            yield Entry(name, parameter, options, shape, parameter, False, trained, number, computes=computes)

    def _flat_entries(self, flats: list[Tensor], number: int, options: PreconditionerOptions) -> Iterator[Entry]:
        """The parameters in ZeRO's flat tensors."""
        given = self._given[number]
        names = {reference(): name for reference, name in zip(given.references, given.names, strict=True)}
        for flat in flats:
            key, parameters = zero.members(flat, number, given.parameters())
            for parameter in parameters:
                if parameter not in names:
                    raise ValueError(f"ZeRO keeps a parameter of shape {zero.whole_shape(parameter)} in another group")
                yield Entry(
                    names[parameter], parameter, options, zero.whole_shape(parameter), flat, True, True, number, key
                )

    def _names_of_replacements(self, params: list[Tensor], number: int) -> list[str]:
        """The names of the parameters that ``params`` have replaced one by one, all or the trained ones."""
        given = self._given[number]
        trained = [reference() is not None and bool(reference().requires_grad) for reference in given.references]  # type: ignore[union-attr]
        for chosen in ([True] * len(trained), trained):
            names = [name for name, keep in zip(given.names, chosen, strict=True) if keep]
            shapes = [shape for shape, keep in zip(given.shapes, chosen, strict=True) if keep]
            if shapes == [parameter.shape for parameter in params]:
                return names
        raise ValueError(
            f"param group {number} was given {len(given.names)} parameters of shapes {_few(given.shapes)} and now has "
            f"{len(params)} of shapes {_few([parameter.shape for parameter in params])}: no telling which is which"
        )


def _lasting(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options without those that schedulers change."""
    return {
        k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr", "momentum", "betas")
    }


def _number(key: Hashable) -> tuple[int, ...]:
    return (key,) if isinstance(key, int) else (key[1],)  # type: ignore[index]


def _few(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes[:3]) + (", ..." if len(shapes) > 3 else "")
