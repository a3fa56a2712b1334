"""Tensors that hold no data, and so cannot be trained: FSDP2's whole weights of a pass, meta and fake tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .held import HeldParameter
from .placement import local_tensor


def refuse_freed(entries: Iterable[HeldParameter]) -> None:
    """Raise ValueError if a parameter that is to be trained is a whole weight that FSDP2 has made for one pass.

    A forward pass without gradients leaves such tensors in the place of the root's parameters. The next backward pass
    frees their memory, which tells them from all others, and gives its gradients to the parameters themselves.
    """
    freed = [entry.name for entry in entries if entry.trained and not entry.flat and _is_freed(entry.parameter)]
    if freed:
        raise ValueError(
            f"{freed[0]} is not the model's parameter, but a whole weight that FSDP2 has made for one forward pass, so "
            f"it would never be trained ({len(freed)} are like that): call model.reshard() after an evaluation and "
            "before the optimizer is made"
        )


def _is_freed(parameter: Tensor) -> bool:
    """Whether the memory of a plain tensor was taken away."""
    if type(parameter) not in (Tensor, nn.Parameter) or parameter.grad is not None:
        return False
    return parameter.numel() > 0 and parameter.untyped_storage().nbytes() == 0


def is_nonzero(name: str, gradient: Tensor | None) -> bool:
    """Return whether the ``gradient`` of a parameter has an element other than 0 on this rank.

    Raises:
        RuntimeError: there is no telling, since it has no data.
    """
    if gradient is None:
        return False
    own = local_tensor(gradient)
    try:
        return bool(own.any())
    except Exception as error:
        if own.is_meta or isinstance(own, torch._subclasses.FakeTensor):
            raise RuntimeError(
                f"{name} is a meta or fake tensor, on which Shampoo4 cannot step, as eigenbases depend on values: "
                "estimate_memory() tells the bytes of its states from shapes alone"
            ) from error
        raise
