"""What base optimizers keep, and what they would make of given parameters; low-bit states among it.

Low-bit optimizers keep moments as codes, scales and maps: torchao's in one tensor subclass that looks like the float
tensor that it stands for and can dequantise itself, bitsandbytes' each in a tensor of its own. Nothing here knows
either by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .integrations.fsdp import is_dtensor, local_tensor

State = dict[str, Any]
_CODES = (torch.uint8, torch.int8)


# -- what is in a state ------------------------------------------------------------------------------------------------


def plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors with a storage of their own in (nested) containers and tensor subclasses, those of this rank."""
    for value in values:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors(getattr(value, name) for name in names)
        elif isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            yield from (value._indices(), value._values())
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from plain_tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from plain_tensors(value)


def bytes_by_tensor(values: Iterable[Any]) -> dict[Hashable, int]:
    """Bytes of every tensor that :func:`plain_tensors` finds; one that stands in several places is there once.

    The keys tell tensors apart for as long as they live.
    """
    found: dict[Hashable, int] = {}
    for tensor in plain_tensors(values):
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())
        found[place] = tensor.numel() * tensor.element_size()
    return found


def is_low_bit(value: Any) -> bool:
    """Whether this is a tensor, sharded or not, that keeps codes and knows what floats they stand for."""
    if not isinstance(value, Tensor):
        return False
    local = local_tensor(value)
    own = getattr(type(local), "dequantize", Tensor.dequantize)  # every tensor has the method, for torch's own types
    return is_traceable_wrapper_subclass(local) and own is not Tensor.dequantize


def floats(value: Tensor) -> Tensor:
    """An elementwise state's numbers, flattened, of this rank: in float32 where they are kept in low precision.

    Sparse ones, such as SGD's momentum of sparse gradients, are made dense.
    """
    local = local_tensor(value).detach()
    local = local if local.layout == torch.strided else local.to_dense()
    numbers: Tensor = local.dequantize().float() if is_low_bit(local) else local
    return numbers.reshape(-1)


def refuse_unportable(rule: type[Optimizer], name: str, state: Mapping[str, Any], shape: torch.Size) -> None:
    """Raise ValueError unless all that ``rule`` keeps of a parameter is elementwise or a number.

    ``shape`` is that of the tensor that the optimizer steps on.
    """
    for key, value in state.items():
        if isinstance(value, Tensor):
            portable = (value.shape == shape and value.dtype not in _CODES) or value.numel() == 1
        else:
            portable = isinstance(value, (int, float))
        if not portable:
            kind = f"{value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"base={rule.__name__} of {rule.__module__} keeps {key} of {name} ({kind}), which is neither a number "
                "nor an elementwise state that can dequantise itself: a portable checkpoint cannot hold it. Save "
                "optimizer.state_dict() with torch.save, or use another base, such as torchao's low-bit optimizers"
            )


# -- what a base makes -------------------------------------------------------------------------------------------------


def make(rule: type[Optimizer], arguments: Mapping[str, Any], like: Sequence[Tensor]) -> list[State]:
    """The states that ``rule`` makes in one step with zero gradients, of parameters like these; nothing is compiled."""
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in like]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = rule(parameters, **arguments)
    compiles = not rule.__module__.startswith("torch.optim")  # perhaps; the switch takes seconds to import
    with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
        optimizer.step()
    return [dict(optimizer.state[parameter]) for parameter in parameters]


def imagine(
    rule: type[Optimizer], arguments: Mapping[str, Any], sizes: Sequence[int], dtype: torch.dtype
) -> list[State] | None:
    """Like :func:`make`, of vectors of these sizes, on the meta device and so without memory.

    None if ``rule`` cannot step there, as torch's own cannot with ``fused=True``.
    """
    try:
        return make(rule, arguments, [torch.empty(size, dtype=dtype, device="meta") for size in sizes])
    except Exception:
        return None


def bytes_on_ranks(
    rule: type[Optimizer], arguments: Mapping[str, Any], dtype: torch.dtype, sizes: Sequence[Sequence[int]]
) -> list[int]:
    """Bytes of all states on every rank, of which ``sizes`` tells the elements of each tensor that it steps on.

    Every size is tried out, twice, as low-bit optimizers keep some sizes in float32 and share maps between parameters.
    Raises ValueError for a base that cannot be tried without memory and is not elementwise.
    """
    distinct = sorted({size for local in sizes for size in local})
    states = imagine(rule, arguments, [size for size in distinct for _ in range(2)], dtype)
    if states is None:
        per_element, per_tensor = _elementwise_costs(rule, arguments, dtype)
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


def _elementwise_costs(rule: type[Optimizer], arguments: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes for each element and for each parameter, read off small ones on the CPU.

    Raises ValueError if bytes do not grow evenly with elements.
    """
    sizes = (16, 32, 8192)
    states = make(rule, arguments, [torch.empty(size, dtype=dtype, device="cpu") for size in sizes])
    found = [sum(bytes_by_tensor([state]).values()) for state in states]
    per_element = (found[1] - found[0]) // 16
    per_tensor = found[0] - 16 * per_element
    if found != [per_element * size + per_tensor for size in sizes]:
        raise ValueError(
            f"base={rule.__name__} of {rule.__module__} cannot step on the meta device, and keeps {found} bytes of "
            f"{sizes} elements: no telling its bytes before training"
        )
    return per_element, per_tensor


# -- what a base is given ----------------------------------------------------------------------------------------------


def tensor_options(group: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The options that a base has made tensors of in its own group, and their types: torchao's learning rate."""
    return {name: value.dtype for name, value in group.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def as_tensors(groups: Sequence[dict[str, Any]], options: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Give a base these options as the tensors that it asks for; outside they stay the numbers that they are.

    Schedulers, checkpoints and programs that set ``group["lr"]`` then work as with any base.
    """
    numbers = [{name: group[name] for name in options if isinstance(group[name], (int, float))} for group in groups]
    try:
        for group, plain in zip(groups, numbers, strict=True):
            group.update(
                {name: torch.tensor(value, dtype=options[name], device="cpu") for name, value in plain.items()}
            )
        yield
    finally:
        for group, plain in zip(groups, numbers, strict=True):
            group.update(plain)


def step(base: Optimizer) -> None:
    """Let ``base`` take its step; hooks for all optimizers do not run here, as they run around Shampoo4's own step."""
    bound: Any = base.step
    rule: Any = getattr(bound, "__func__", None)
    if getattr(rule, "hooked", False):
        rule.__wrapped__(base)
    else:
        bound()


@contextlib.contextmanager
def refusing_dtensors(rule: type[Optimizer], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Raise TypeError, saying what to do, where ``rule``'s own kernels do not take the DTensors of FSDP2 and HSDP."""
    try:
        yield
    except RuntimeError as error:
        unknown = any(words in str(error) for words in ("DTensor", "sharding strategy"))
        if unknown and any(map(is_dtensor, parameters)):
            raise TypeError(
                f"base={rule.__name__} of {rule.__module__} cannot step on the DTensors that FSDP2 and HSDP make of "
                "parameters: use DDP or FSDP1, or another base, such as torchao's low-bit optimizers"
            ) from error
        raise


def load_by_base(base: Optimizer, plain: dict[str, Any], optimizer: Optimizer) -> None:
    """Let a base that has a ``load_state_dict`` of its own load ``optimizer``'s states in its way.

    torch's casts states to the type of their parameters, which codes do not survive.
    """
    if type(base).load_state_dict is not Optimizer.load_state_dict:
        base.param_groups, base.state = optimizer.param_groups, optimizer.state
        base.load_state_dict(plain)
        optimizer.state = base.state
