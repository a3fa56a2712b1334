"""A parameter as it is held on this rank at a step, and what of all parameters decides whether anything has changed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hosts import Host
from .numerics.matrix import Matrix
from .options import PreconditionerOptions
from .placement import dtensor_class, placements_of, reading_attributes
from .planning.schedule import Phases
from .planning.shards import Shard
from .planning.views import View, matrix_view


@dataclass(frozen=True)
class HeldParameter:
    """A parameter as it is held on this rank at a step.

    Attributes:
        name: for messages.
        parameter: in the group; the one that was given, where the group has a flat tensor instead.
        options: of its group.
        shape: of the whole parameter.
        holder: what stands in the group: its gradient holds this rank's elements.
        flat: whether the holder is a flat tensor with parts of several parameters.
        trained: whether it takes part in the training.
        group: number of the group that it was given in.
        host: that knows where it lies.
        key: equal for all parameters that ``step()`` is given together, and on every rank.
    """

    name: str
    parameter: Tensor
    options: PreconditionerOptions
    shape: torch.Size
    holder: Tensor
    flat: bool
    trained: bool
    group: int
    host: Host = field(compare=False, repr=False)
    key: Hashable = None

    @property
    def device(self) -> torch.device:
        """Where its gradient is preconditioned."""
        return self.host.compute_device(self.holder)

    @property
    def dtype(self) -> torch.dtype:
        """In what its direction is computed."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def view(self) -> View | None:
        """How it is seen as matrices; None if it is not preconditioned."""
        return matrix_view(self.name, self.shape, self.options) if self.trained else None

    @property
    def is_soap(self) -> bool:
        """Whether it goes along its direction by itself: the base optimizer neither steps on it nor keeps states."""
        return self.options.method == "soap" and self.view is not None

    def matrix(self, schedule: Mapping[tuple[int, str], Phases]) -> Matrix | None:
        """Its matrix, with fresh factors that are due as ``schedule`` says; None if it is not preconditioned."""
        if not self.trained:
            return None
        phases = schedule.get((self.group, self.name), {})
        return Matrix.of(self.name, self.shape, self.options, self.device, self.dtype, phases)

    @cached_property
    def _place(self) -> tuple[Shard, int]:
        return self.host.locate(self.name, self.parameter, self.holder)

    @property
    def shard(self) -> Shard:
        """The elements that this rank holds. Raises ValueError if there is no telling."""
        return self._place[0]

    @property
    def in_holder(self) -> slice:
        """Where these elements are in the flattened holder."""
        shard, offset = self._place
        return slice(offset, offset + shard.length)

    def check(self, gradient: Tensor | None) -> None:
        """Check that it can be trained with ``gradient``. All else is for the base optimizer to judge.

        Raises:
            ValueError: its host cannot train it, ``matmul_dtype="tf32"`` is not for its device, or ``gradient`` has
                other placements.
            TypeError: it is preconditioned, and the matrix or ``gradient`` is sparse or complex.
        """
        self.host.check_parameter(self.name, self.parameter, self.holder, self.options.precondition)
        if self.view is None:
            return
        if self.options.matmul_dtype == "tf32" and self.device.type not in ("cuda", "meta"):
            raise ValueError(
                f"matmul_dtype='tf32' is for CUDA devices, but {self.name} is preconditioned on {self.device}: choose "
                "'float32' or 'bfloat16'"
            )
        if gradient is not None and placements_of(gradient) != placements_of(self.holder):
            raise ValueError(
                f"{self.name} has placements {placements_of(self.holder)}, but its gradient has "
                f"{placements_of(gradient)}: call p.grad = p.grad.redistribute(placements=p.placements) before step(), "
                "or shard the model by FSDP2, which does that"
            )
        instead = f"leave {self.name} to the base optimizer: put it into a param group with precondition=False"
        if gradient is not None and gradient.layout != torch.strided:
            raise TypeError(
                f"the gradient of {self.name} is sparse ({gradient.layout}), and Shampoo4 preconditions dense ones "
                f"only: {instead}, with a base that takes sparse gradients ('sgd', 'adagrad'); or make its embedding "
                "with sparse=False"
            )
        for kind, tensor in ((f"the gradient of {self.name}", gradient), (self.name, self.parameter)):
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(
                    f"{kind} is of type {tensor.dtype}, and Shampoo4 preconditions real numbers only: {instead}"
                )


class Signature(NamedTuple):
    """What a step depends on: two steps with equal signatures are about the same tensors, options and gradients' types.

    Attributes:
        first: id of the first tensor.
        tensors: all that is asked of each tensor in the groups.
        options: of all groups of the optimizer, and the identity and length of the groups in this step.
        version: of what is known of the parameters.
    """

    first: int
    tensors: list[tuple[Any, ...]]
    options: list[list[Any]]
    version: int


def describe_tensors(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what a step depends on of each tensor in ``groups`` and of its gradient, as cheaply as possible."""
    kind = dtensor_class()
    with reading_attributes():
        return [_describe(tensor, kind) for group in groups for tensor in group["params"]]


def _describe(tensor: Any, kind: Any) -> tuple[Any, ...]:
    placements = tensor.placements if isinstance(tensor, kind) else None
    described = id(tensor), tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape, placements
    gradient = tensor.grad
    if gradient is None:
        return described
    placements = gradient.placements if isinstance(gradient, kind) else None
    return *described, gradient.dtype, gradient.layout, placements
