"""What a checkpoint is about: an optimizer with its parameters as they are held now, its ranks and its model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..base import State
from ..distributor import Distributor
from ..held import HeldParameter
from ..hosts import Host, of_engine, reshard
from ..numerics.matrix import Matrix
from ..optimizer import Shampoo4
from ..placement import local_tensor
from ..planning.plan import Owned
from ..updates import Updates
from .consistency import Arguments
from .untrained import Untrained, find, of_parameter


class Subject:
    """An optimizer, attached to its parameters as they are, for one save or load.

    The constructor is collective. All else is looked up once, when it is first asked for: what may fail on one rank
    must first be asked for inside ``ranks.together()``.

    Args:
        optimizer: a Shampoo4, a wrapper around one, or DeepSpeed's engine.
        model: wrapped as it is, or None.
        frozen: whether frozen parameters are saved or loaded.
        calling: the call, for messages.
    """

    def __init__(self, optimizer: Any, model: nn.Module | None, frozen: bool, calling: str) -> None:
        self.frozen = frozen
        self.optimizer = _unwrap(optimizer)
        engine = self.optimizer.host.engine
        self.model = model if engine is None else engine
        self._session, self._entries = self.optimizer.attach(calling, self.model)
        self.host = self.optimizer.host
        assert self._session.ranks is not None
        self.ranks = self._session.ranks
        self._imagined: dict[tuple[int, int, torch.dtype], State] = {}

    @property
    def arguments(self) -> Arguments:
        """What the call was given; an engine brings its model."""
        return Arguments(self.model is not None, self.frozen)

    def give_up_whole_weights(self) -> None:
        """Have the model's next pass begin with its shards, also where no model was given but FSDP has one."""
        for module in _of_fsdp(self.host) if self.model is None else ():  # attach() has seen to a given one
            reshard(module)

    @cached_property
    def names(self) -> dict[str, str]:
        """Plain names by the labels of entries and matrices. Raises ValueError if a parameter has none of its own."""
        return self._session.members.plain_names()

    @cached_property
    def trained(self) -> dict[str, HeldParameter]:
        """All parameters that are trained, by plain names, in the same order on every rank.

        Raises:
            ValueError: a parameter has no name of its own, or there is no telling which elements this rank holds.
        """
        trained = {self.names[entry.name]: entry for entry in self._entries if entry.trained}
        for entry in trained.values():
            _ = entry.shard
        return trained

    @cached_property
    def untrained(self) -> list[Untrained]:
        """What the model has beside trained parameters; without a model, what stands in the groups and is frozen."""
        if self.model is None:
            still = [entry for entry in self._entries if not entry.trained]
            return [of_parameter(self.names[entry.name], entry.parameter, self.host) for entry in still]
        trained = [tensor for entry in self.trained.values() for tensor in (entry.parameter, entry.holder)]
        given = [parameter for _, parameter, _ in self._session.members.given() if parameter is not None]
        trained += [parameter for parameter in given if parameter.requires_grad]
        return find(self.model, trained, self.host)

    @property
    def saved_untrained(self) -> list[Untrained]:
        """What of those is saved."""
        if self.model is None:
            return []
        return [other for other in self.untrained if self.frozen or not other.frozen]

    @cached_property
    def updates(self) -> Updates:
        """Where the base's states of each parameter are."""
        return Updates(self._entries)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, by the numbers that entries have."""
        return self._session.members.groups

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """All preconditioned parameters, by plain names."""
        for distributor in self._session.all():
            for matrix in distributor.matrices:
                yield self.names[matrix.name], matrix

    def own_blocks(self) -> Iterator[tuple[str, Distributor, Matrix, Owned]]:
        """All blocks that this rank owns, with the plain names of their parameters."""
        for distributor in self._session.all():
            for index, matrix in enumerate(distributor.matrices):
                for owned in distributor.own_blocks(index).values():
                    yield self.names[matrix.name], distributor, matrix, owned

    def mark_loaded(self) -> None:
        """Mark the loaded factors in ``optimizer.state``, and drop the states of parameters that are not trained."""
        self.optimizer._consolidated = None
        self._session.loaded = {}
        for entry in self._entries:
            if not entry.trained:
                self.optimizer.state.pop(entry.parameter, None)
        self._session.mark_loaded(self.optimizer.state)

    def is_elementwise(self, entry: HeldParameter, kind: str, value: Any) -> bool:
        """Return whether a state of the base has an element for each element of a parameter.

        The count of steps of a scalar parameter has its shape too: there the states of a vector tell.
        """
        holder = self.updates.state_like(entry.holder)
        if not isinstance(value, Tensor) or value.shape != holder.shape:
            return False
        if holder.ndim:
            return True
        made = self._imagine(entry.group, 2, holder.dtype).get(kind)
        return made.numel() == 2 if isinstance(made, Tensor) else kind != "step"

    def imagined_states(self, entry: HeldParameter) -> State:
        """Return the states that the base would make of a parameter, on the meta device; empty if it cannot tell.

        They are vectors of this rank's elements of what the base steps on, and numbers.
        """
        holder = local_tensor(self.updates.state_like(entry.holder))
        return self._imagine(entry.group, holder.numel(), holder.dtype)

    def _imagine(self, group: int, elements: int, dtype: torch.dtype) -> State:
        key = (group, elements, dtype)
        if key not in self._imagined:
            made = self.optimizer.base.meta_states([elements], dtype, self.groups[group])
            self._imagined[key] = made[0] if made else {}
        return self._imagined[key]


def _of_fsdp(host: Host) -> list[nn.Module]:
    """The modules that FSDP shards in this process: FSDP1's that were bound, and all of FSDP2's."""
    states = sys.modules.get("torch.distributed._composable_state")
    return [*getattr(host, "units", ()), *getattr(states, "_module_state_mapping", ())]


def _unwrap(optimizer: Any) -> Shampoo4:
    """The Shampoo4 in whatever wrappers. It is told of the framework's engine if there is one around it."""
    host: Host | None = None
    for _ in range(8):
        if isinstance(optimizer, Shampoo4):
            if host is not None and optimizer.host.engine is None:
                optimizer.use_host(host)
            return optimizer
        found = of_engine(optimizer)
        if found is not None:
            host, optimizer = found
        else:
            optimizer = getattr(optimizer, "optimizer", None)
    raise TypeError("checkpoints need a Shampoo4 optimizer, a wrapper around one, or a DeepSpeed engine that has one")
