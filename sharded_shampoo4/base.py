"""The base optimizer: the elementwise rule, torch's or another library's, that takes directions as its gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base_options import base_arguments, base_class, base_value
from .labels import label
from .placement import dtensor_class, is_dtensor, reading_attributes
from .state_dict import STATE_KEY
from .tensors import bytes_by_tensor

State = dict[str, Any]
Groups = Sequence[dict[str, Any]]

_CODES = (torch.uint8, torch.int8)


class Base:
    """A base optimizer, which steps on the groups and states that it is given.

    Its own instance of the rule holds a stand-in only: hosts replace parameters after construction, so nothing is kept
    of them.

    Args:
        base: ``"adamw"``, ``"sgd"``, ``"adagrad"`` or a torch optimizer class.
        lr: learning rate.
        weight_decay: weight decay; 0 for a rule that has none.
        options: further options of the rule.

    Attributes:
        rule: the optimizer class.
        arguments: the keyword arguments with which it is made.
        defaults: the rule's defaults for parameter groups.

    Raises:
        TypeError: an option that the rule does not know, or a ``base`` that is no optimizer class.
        ValueError: a value that makes no sense, or a rule that is not elementwise.
    """

    def __init__(
        self, base: str | type[Optimizer], lr: Any, weight_decay: Any = 0.0, options: Mapping[str, Any] | None = None
    ) -> None:
        rule = base_class(base)
        self._make(rule, base_arguments(rule, lr, weight_decay, options or {}))

    def _make(self, rule: type[Optimizer], arguments: dict[str, Any]) -> None:
        self.rule, self.arguments = rule, arguments
        self._optimizer = rule([_stand_in()], **arguments)
        self._makes_states_early = bool(self._optimizer.state)  # in its constructor, as Adagrad does
        # Options that the rule has made tensors of in its own group, such as torchao's learning rate.
        group = self._optimizer.param_groups[0]
        self._tensor_options = {name: value.dtype for name, value in group.items() if isinstance(value, Tensor)}

    def __getstate__(self) -> dict[str, Any]:
        return {"rule": self.rule, "arguments": self.arguments}  # a copied torch optimizer would lose its options

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._make(**state)

    @property
    def name(self) -> str:
        """The name of the rule's class."""
        return self.rule.__name__

    @property
    def defaults(self) -> dict[str, Any]:
        return self._optimizer.defaults

    @property
    def option_names(self) -> list[str]:
        """The rule's options: those that it was made with, and those in its defaults."""
        return list({**self.arguments, **self.defaults})

    def converted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Convert ``options`` of a parameter group to what the rule's constructor takes.

        Raises:
            TypeError, ValueError: what the rule says when it is made with them.
        """
        parameters = inspect.signature(self.rule).parameters
        found = {name: base_value(parameters, name, value) for name, value in options.items()}
        if found:
            self.rule([_stand_in()], **{**self.arguments, **found})
        return found

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, groups: Groups, states: MutableMapping[Tensor, Any]) -> None:
        """Take the rule's own step on ``groups`` and ``states``.

        Hooks for all optimizers do not run here, as they run around Shampoo4's own step.

        Raises:
            TypeError: the rule's kernels do not take the DTensors of FSDP2 and HSDP.
        """
        bound: Any = self._optimizer.step
        function: Any = getattr(bound, "__func__", None)
        is_torchs = self.rule.__module__.startswith("torch.optim")
        with _held(groups, states) if is_torchs else contextlib.nullcontext((groups, states)) as (groups, states):
            self._take(groups, states)
            if self._makes_states_early:
                self._make_missing(groups, states)
            try:
                with label("base"), self._options_as_tensors(groups), self._refusing_dtensors(groups):
                    if getattr(function, "hooked", False):
                        function.__wrapped__(self._optimizer)
                    else:
                        bound()
            finally:
                self._take([], {})

    def make_states(self, groups: Groups, states: MutableMapping[Tensor, Any]) -> None:
        """Make the states of all parameters with gradients, which are zero, as a step does, but count no step."""
        still = {"lr": 0.0, "weight_decay": 0.0}
        kept = [{name: group[name] for name in still} for group in groups]
        for group in groups:
            group.update(still)
        try:
            self.step(groups, states)
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)
        for state in states.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0

    def load(self, plain: dict[str, Any], optimizer: Optimizer, soap: Collection[Tensor]) -> None:
        """Go on with ``optimizer``'s groups and states, which it has just loaded from the state_dict ``plain``.

        The parameters ``soap`` are not the base's: what stands in their states is some wrapper's.

        A rule that has a ``load_state_dict`` of its own loads the states in its way: torch's casts them to the type
        of their parameters, which codes do not survive.
        """
        if self.rule.load_state_dict is not Optimizer.load_state_dict:
            self._take(optimizer.param_groups, optimizer.state)
            self._optimizer.load_state_dict(plain)
            optimizer.state = self._optimizer.state
        own = {parameter: state for parameter, state in optimizer.state.items() if parameter not in soap}
        self._optimizer.__setstate__({"state": own, "param_groups": optimizer.param_groups})

    def _take(self, groups: Any, states: Any) -> None:
        self._optimizer.param_groups, self._optimizer.state = groups, states

    def _make_missing(self, groups: Groups, states: MutableMapping[Tensor, Any]) -> None:
        """Make the states that the rule makes in its constructor, for parameters that have none yet."""
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not states.get(parameter):
                    states[parameter] = self.rule([parameter], **self._arguments_of(group)).state[parameter]

    @contextlib.contextmanager
    def _options_as_tensors(self, groups: Groups) -> Iterator[None]:
        """Give the rule the tensors that it has made of options; outside they stay the numbers that they are.

        Schedulers, checkpoints and programs that set ``group["lr"]`` then work as with any rule.
        """
        types = self._tensor_options
        numbers = [{name: group[name] for name in types if isinstance(group[name], (int, float))} for group in groups]
        try:
            for group, plain in zip(groups, numbers, strict=True):
                for name, value in plain.items():
                    group[name] = torch.tensor(value, dtype=types[name], device="cpu")
            yield
        finally:
            for group, plain in zip(groups, numbers, strict=True):
                group.update(plain)

    @contextlib.contextmanager
    def _refusing_dtensors(self, groups: Groups) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            unknown = any(words in str(error) for words in ("DTensor", "sharding strategy"))
            if unknown and any(is_dtensor(parameter) for group in groups for parameter in group["params"]):
                raise TypeError(
                    f"base={self.name} of {self.rule.__module__} cannot step on the DTensors that FSDP2 and HSDP make "
                    "of parameters: use DDP or FSDP1, or another base, such as torchao's low-bit optimizers"
                ) from error
            raise

    # -- states --------------------------------------------------------------------------------------------------------

    def _arguments_of(self, group: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments, with the values that stand in a group."""
        return {name: (group or {}).get(name, value) for name, value in self.arguments.items()}

    def states_of(self, tensors: Sequence[Tensor], group: Mapping[str, Any] | None = None) -> list[State]:
        """Make the states of parameters like ``tensors``, in one step with zero gradients; nothing is compiled.

        Args:
            tensors: of which neither the values are read nor anything is changed.
            group: whose options the parameters have (default: the arguments).
        """
        parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = self.rule(parameters, **self._arguments_of(group))
        compiles = not self.rule.__module__.startswith("torch.optim")  # perhaps; the switch takes seconds to import
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            optimizer.step()
        return [dict(optimizer.state[parameter]) for parameter in parameters]

    def meta_states(
        self, sizes: Sequence[int], dtype: torch.dtype, group: Mapping[str, Any] | None = None
    ) -> list[State] | None:
        """Like :meth:`states_of`, of vectors of these sizes, on the meta device and so without memory.

        None if the rule cannot step there, as torch's own cannot with ``fused=True``.
        """
        try:
            return self.states_of([torch.empty(size, dtype=dtype, device="meta") for size in sizes], group)
        except Exception:
            return None

    def refuse_unportable(self, name: str, state: Mapping[str, Any], shape: torch.Size) -> None:
        """Raise ValueError unless all that the rule keeps of the parameter ``name`` is elementwise or a number.

        ``shape`` is that of the tensor that the optimizer steps on.
        """
        for key, value in state.items():
            if isinstance(value, Tensor):
                portable = (value.shape == shape and value.dtype not in _CODES) or value.numel() == 1
                kind = f"{value.dtype}, shape {tuple(value.shape)}"
            else:
                portable, kind = isinstance(value, (int, float)), type(value).__name__
            if not portable:
                raise ValueError(
                    f"base={self.name} of {self.rule.__module__} keeps {key} of {name} ({kind}), which is neither a "
                    "number nor an elementwise state that can dequantize itself: a portable checkpoint cannot hold it. "
                    "Save optimizer.state_dict() with torch.save, or use another base, such as torchao's low-bit "
                    "optimizers"
                )

    def bytes_on_ranks(self, dtype: torch.dtype, sizes: Sequence[Sequence[int]]) -> list[int]:
        """Predict the bytes of all states on every rank.

        Every size is tried out, twice, as low-bit optimizers keep some sizes in float32 and share maps between
        parameters.

        Args:
            dtype: of the parameters.
            sizes: by rank, the elements of each tensor that it steps on.

        Raises:
            ValueError: the rule cannot be tried without memory and is not elementwise.
        """
        distinct = sorted({size for local in sizes for size in local})
        states = self.meta_states([size for size in distinct for _ in range(2)], dtype)
        if states is None:
            per_element, per_tensor = self._elementwise_bytes(dtype)
            return [sum(per_element * size + per_tensor for size in local) for local in sizes]
        own: dict[int, int] = {}
        shared: dict[int, dict[Hashable, int]] = {}
        for size, state, another in zip(distinct, states[::2], states[1::2], strict=True):
            found, others = bytes_by_tensor([state]), bytes_by_tensor([another])
            own[size] = sum(count for tensor, count in found.items() if tensor not in others)
            shared[size] = {tensor: count for tensor, count in found.items() if tensor in others}
        totals = []
        for local in sizes:
            once = {tensor: count for size in set(local) for tensor, count in shared[size].items()}
            totals.append(sum(own[size] for size in local) + sum(once.values()))
        return totals

    def _elementwise_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Read bytes for each element and for each parameter off small ones on the CPU.

        Raises ValueError if bytes do not grow evenly with elements.
        """
        sizes = (16, 32, 8192)
        states = self.states_of([torch.empty(size, dtype=dtype, device="cpu") for size in sizes])
        found = [sum(bytes_by_tensor([state]).values()) for state in states]
        per_element = (found[1] - found[0]) // 16
        per_tensor = found[0] - 16 * per_element
        if found != [per_element * size + per_tensor for size in sizes]:
            raise ValueError(
                f"base={self.name} of {self.rule.__module__} cannot step on the meta device, and keeps {found} bytes "
                f"of {sizes} elements: no telling its bytes before training"
            )
        return per_element, per_tensor


@contextlib.contextmanager
def _held(groups: Groups, states: MutableMapping[Tensor, Any]) -> Iterator[tuple[Groups, MutableMapping[Tensor, Any]]]:
    """``groups`` and ``states`` with the tensors that this rank holds in place of DTensors, for a step.

    An elementwise rule computes the same numbers on them, and torch takes much longer to dispatch an operation on a
    DTensor. Both are given back unchanged in two cases: a parameter has no state yet, since its state must become a
    DTensor too; or a gradient has other placements than its parameter, since the ranks must add it up first.
    """
    with reading_attributes():
        local = _local(groups, states)
    if local is None:
        yield groups, states
        return
    held, of_held, lent = local
    try:
        for parameter, gradient in lent:
            parameter.grad = gradient
        yield held, of_held
    finally:
        for parameter, _ in lent:
            parameter.grad = None


def _local(groups: Groups, states: Mapping[Tensor, Any]) -> tuple[Groups, dict[Tensor, State], list[Any]] | None:
    """What stands for ``groups`` and ``states`` in a step, and the pairs of local parameters and gradients in them.

    None where there is no DTensor, or the rule must step on the DTensors themselves.
    """
    kind: Any = dtensor_class()
    held: list[dict[str, Any]] = []
    of_held: dict[Tensor, State] = {}
    lent: list[tuple[Tensor, Tensor]] = []
    if not any(isinstance(parameter, kind) for group in groups for parameter in group["params"]):
        return None
    for group in groups:
        params = []
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state: Any = states.get(parameter)
            if not _is_made(state):
                return None
            if isinstance(parameter, kind):
                if not _is_alike(parameter, gradient, kind):
                    return None
                parameter = parameter._local_tensor
                lent.append((parameter, gradient._local_tensor))
                state = {name: v._local_tensor if isinstance(v, kind) else v for name, v in state.items()}
            params.append(parameter)
            of_held[parameter] = state
        held.append({**group, "params": params})
    return held, of_held, lent


def _is_alike(parameter: Any, gradient: Any, kind: Any) -> bool:
    """Whether the local tensors of a DTensor and its gradient are of the same elements and type."""
    return (
        isinstance(gradient, kind) and parameter.placements == gradient.placements and parameter.dtype == gradient.dtype
    )


def _is_made(state: State | None) -> bool:
    """Whether a parameter has states of the base, and not only the mark of its factors."""
    return state is not None and len(state) > (STATE_KEY in state)


def _stand_in() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
