"""torchtitan: a container of optimizers that knows ``Shampoo4`` too.

    groups = [
        ParamGroupConfig(pattern="norm|embed", optimizer_name="AdamW", optimizer_kwargs={"lr": 8e-4}),
        ParamGroupConfig(pattern=".*", optimizer_name="Shampoo4", optimizer_kwargs={"lr": 2e-3}),
    ]
    config = Shampoo4Container.Config(param_groups=groups, implementation="foreach")    # the Trainer's ``optimizer``
    optimizers = config.build(model_parts=[model])                                      # as the Trainer does

Options of all groups may stand in ``optimizer_factory_kwargs_by_name={"Shampoo4": {...}}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from sharded_shampoo4 import Shampoo4


class Shampoo4Container(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's ``OptimizersContainer`` in which ``optimizer_name="Shampoo4"`` is known."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """That of ``OptimizersContainer``; ``build()`` makes this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "Shampoo4":
            return Shampoo4
        factory: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory
