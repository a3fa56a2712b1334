"""How Shampoo4 is saved, loaded and copied."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .advice import Advice
from .base import Base
from .context import own_arithmetic
from .held import HeldParameter
from .hosts import Host, find_host
from .joining import Joinable, SteppingTogether
from .marks import without_marks
from .members import Members
from .options import PreconditionerOptions
from .packing import PackedState
from .session import Session
from .state_dict import PIECES_KEY, all_factors, held_back, join, own_pieces, packed_factors, read


class SavedStates(SteppingTogether):
    """An optimizer whose states are those of its base and the factors of its session."""

    base: Base
    _members: Members
    _advice: Advice | None
    _consolidated: dict[Tensor, Tensor] | None  # all factors, until the next step
    _saving_is_arranged = False  # by an adapter, which consolidates the state before it is saved, or saves it otherwise

    @property
    def host(self) -> Host:
        """The framework that arranges the parameters. It is known for good from the first step on."""
        return self._members.host

    def _current(self) -> list[Tensor]:
        """What stands in the groups, in their order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _options(self) -> dict[Tensor, PreconditionerOptions]:
        """The options of what stands in the groups."""
        return {p: PreconditionerOptions.of_group(group) for group in self.param_groups for p in group["params"]}

    def attach(self, calling: str, model: torch.nn.Module | None) -> tuple[Session, list[HeldParameter]]:
        """Attach all parameters as they are now, between steps; collective. For portable checkpoints.

        Args:
            calling: the call in which that is done, for messages.
            model: wrapped as it is, which tells names that are missing, or None.

        Returns:
            the session, and every parameter in the groups as it is held.
        """
        return self._session, self._session.attach_all(self.param_groups, self.state, self, calling, model)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's states and, for each preconditioned parameter, its factors as one uint8 vector.

        ``["state"][i]["preconditioner"]`` is a copy; the base's tensors are the live ones, as in torch. Everything
        loads with ``torch.load(weights_only=True)``. Under DeepSpeed's ZeRO 1, 2 and 3, which save every rank's state,
        it holds this rank's part of the factors instead, in ``["preconditioner_pieces"]``. Factors of parameters whose
        group has ``precondition=False`` by now are left out.
        """
        before, after = self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks
        for prepare in list(before.values()):
            prepare(self)
        with held_back(before, after):
            found = self._joined_state_dict()
        for change in list(after.values()):
            replaced = change(self, found)
            found = found if replaced is None else replaced
        return found

    def _joined_state_dict(self) -> dict[str, Any]:
        """The base's states with the factors, before hooks have seen them."""
        if self._members.partitioned:
            if not set(map(id, self.state)) <= set(map(id, self._current())):
                raise RuntimeError("ZeRO 3 takes its tensors out of the optimizer between steps: use save_checkpoint()")
            return {**super().state_dict(), PIECES_KEY: own_pieces(self._session)}
        self._session.let_go(self.param_groups, self.state)
        packed = self._packed(everywhere=find_host(self, self._current()).engine is not None)
        used = {p for p, options in self._options().items() if options.precondition}
        return join(super().state_dict(), [packed.get(p) if p in used else None for p in self._current()])

    @own_arithmetic()
    def consolidate_state_dict(self) -> None:
        """Gather all factors on every rank, on the host, so that :meth:`state_dict` can be called on any of them.

        Collective. Needed before ``state_dict()`` where ranks hold whole parameters or flat ones (DDP, FSDP1): programs
        call it on one rank only there. Valid until the next step.
        """
        if self._session.spread and not self._members.partitioned:
            self._session.begin("consolidate_state_dict()")
            self._consolidated = all_factors(self._session, on_host=True)

    @own_arithmetic()
    def _packed(self, everywhere: bool = False) -> dict[Tensor, Tensor]:
        """The factors that a state_dict holds, without those of parameters whose states were cleared."""
        self.host.check_state_dict()
        cleared = self._session.marks.missing(self.state)
        packed = self._consolidated
        if packed is None:
            packed = packed_factors(self._session, everywhere)
        return {parameter: data for parameter, data in packed.items() if parameter not in cleared}

    @own_arithmetic()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Hyperparameters come from ``state_dict``, as in torch.

        Raises:
            ValueError: it was not written by this optimizer, or with options or shapes that store other bytes; nothing
                has been changed then.
        """
        self.host.check_state_dict()
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = dict(state_dict)
        for change in list(before.values()):
            replaced = change(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        with held_back(before, after):
            plain, loaded = read(state_dict, self._session, self.param_groups)
            super().load_state_dict(plain)
            self.base.load(plain, self, {p for p, entry in loaded.items() if entry.options.method == "soap"})
            self._members.adopt(self.param_groups)
            self._consolidated = None
            self._session.load(loaded)
            if not self._members.partitioned:
                self._session.mark_loaded(self.state)
        for finish in list(after.values()):
            finish(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._session.spread:
            raise RuntimeError("a Shampoo4 that is spread over ranks cannot be copied or pickled: use state_dict()")
        if self._process_group not in (None, "alone"):
            raise RuntimeError("a Shampoo4 that has a process_group cannot be copied or pickled: use state_dict()")
        self._session.let_go(self.param_groups, self.state)
        state = super().__getstate__()
        state["state"] = defaultdict(dict, without_marks(self.state))
        own = {"_process_group": self._process_group, "base": self.base}
        options = {**self._options(), **{p: entry.options for p, entry in self._session.loaded.items()}}
        packed = {p: PackedState(options[p], data) for p, data in self._packed().items() if p in options}
        return {**state, **own, "_consolidated": None, "_loaded": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.pop("_loaded", None)
        super().__setstate__(state)
        if loaded is not None:  # a copy: torch's load_state_dict calls this too, with the parameters as they are
            self._process_group = state.get("_process_group")
            Joinable.__init__(self)
            self._members, self._advice = Members(), Advice()
            for group in self.param_groups:
                self._members.add(group)
            self._session = Session(self._members, self.base.name, self._process_group)
            self._session.load(loaded)
            self._session.mark_loaded(self.state)
