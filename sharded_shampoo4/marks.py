"""Marks in ``optimizer.state`` for the factors, which are kept elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import Any, NoReturn

from torch import Tensor

from .comm.ranks import Ranks
from .held import HeldParameter
from .report import shorten, warn

STATE_KEY = "preconditioner"  # in state_dict()["state"][i]: one uint8 vector for each preconditioned parameter


class _Mark:
    """Stands in ``optimizer.state[p]["preconditioner"]`` for the factors of ``p``, which are kept elsewhere.

    Whoever asks ``optimizer.state`` what a parameter has finds the key; ``state_dict()`` puts the factors in its place.
    """

    def __repr__(self) -> str:
        return "<kept by Shampoo4: see state_dict()>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "optimizer.state does not hold the factors of Shampoo4, so a copy of it would lose them: copy or save "
            "optimizer.state_dict(), or use sharded_shampoo4.checkpoint"
        )


MARK = _Mark()


class Marks:
    """The parameters for whose factors a mark stands in ``optimizer.state``.

    A mark that is missing means that a program has cleared the parameter's states. Its factors are reset then.
    """

    def __init__(self) -> None:
        self.parameters: set[Tensor] = set()

    def put(self, state: MutableMapping[Tensor, Any], parameters: Iterable[Tensor]) -> None:
        """Put marks into ``state``, beside the base's states of ``parameters``."""
        for parameter in parameters:
            state[parameter][STATE_KEY] = MARK
            self.parameters.add(parameter)

    def missing(self, state: Mapping[Tensor, Any]) -> set[Tensor]:
        """Return the parameters whose marks somebody has taken out of ``state``."""
        return {p for p in self.parameters if state.get(p, {}).get(STATE_KEY) is not MARK}

    def hand_over(self, state: MutableMapping[Tensor, Any], entries: Iterable[HeldParameter]) -> None:
        """Leave in ``state`` what belongs to who steps on each parameter now: the base, or soap's own steps."""
        for entry in entries:
            own = state.get(entry.parameter)
            if not own or entry.flat:
                continue
            marks = {STATE_KEY: MARK} if own.get(STATE_KEY) is MARK else {}
            if entry.is_soap:
                state[entry.parameter] = marks
            elif own == marks and (entry.trained or not entry.options.precondition):
                # The base would take the mark for states of its own.
                del state[entry.parameter]
                self.parameters.discard(entry.parameter)

    def agree_on_cleared(
        self,
        ranks: Ranks,
        entries: Iterable[HeldParameter],
        state: Mapping[Tensor, Any],
        cleared: Collection[Tensor],
    ) -> set[str]:
        """Return the names of all parameters whose states were cleared on any rank; collective.

        Args:
            ranks: that must agree.
            entries: of this step.
            state: of the base.
            cleared: the parameters whose marks are missing on this rank.

        Raises:
            ValueError: on every rank alike, if some ranks still have states of them.
        """
        known = [entry for entry in entries if entry.parameter in self.parameters]
        gone = {entry.name for entry in known if entry.parameter in cleared}
        replaced = [entry.name for entry in known if entry.name in gone and state.get(entry.parameter)]
        everyone = ranks.gather((gone, {entry.name for entry in known} - gone))
        names = set[str]().union(*(gone for gone, _ in everyone))
        for rank, (_, intact) in enumerate(everyone):
            if names & intact:
                raise ValueError(f"optimizer.state of {min(names & intact)} was cleared, but not on rank {rank}")
        if replaced:
            warn(
                f"optimizer.state of {shorten(replaced)} was replaced "
                "without the factors, which are reset: use optimizer.load_state_dict()"
            )
        return names

    def keep(self, parameters: Collection[Tensor]) -> None:
        """Forget all others than ``parameters``."""
        self.parameters.intersection_update(parameters)


def without_marks(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the states of the base alone; parameters for which nothing is left are left out."""
    plain = {key: {name: v for name, v in entry.items() if v is not MARK} for key, entry in state.items()}
    return {key: entry for key, entry in plain.items() if entry or not state[key]}
