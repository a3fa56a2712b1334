"""axolotl: a plugin that trains with ``Shampoo4`` where the YAML file has a key ``shampoo4``.

    plugins:
      - sharded_shampoo4.integrations.axolotl.Shampoo4Plugin
    optimizer: adamw_torch      # what axolotl checks; the key below takes its place
    learning_rate: 2e-3
    shampoo4:                   # options of integrations.transformers.shampoo4, or {}
      preset: compact
      exclude: embed|lm_head

Learning rate, weight decay and Adam's options are those of the file.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from sharded_shampoo4 import Shampoo4

from .transformers import ConsolidateStates, PortableStates, Shampoo4Factory, shampoo4

_GROUPING = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")  # what makes groups of its own


class Shampoo4Args(BaseModel):
    """The plugin's key in the YAML file."""

    shampoo4: dict[str, Any] | None = None


class Shampoo4Plugin(BasePlugin):  # type: ignore[misc]
    """Gives the Trainer that axolotl has made the optimizer that ``shampoo4:`` describes."""

    def get_input_args(self) -> str:
        """Return the name of the class of the plugin's keys."""
        return f"{__name__}.{Shampoo4Args.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Name the optimizer that the Trainer will make, and have its checkpoints complete under DDP.

        axolotl 0.19 never calls ``create_optimizer`` of plugins.

        Raises:
            ValueError: the file also has learning rates for some parameters, or an optimizer of axolotl's own.
        """
        if cfg.shampoo4 is None:
            return
        given = [name for name in _GROUPING if getattr(trainer.args, name, None) is not None]
        if given or trainer.optimizer_cls_and_kwargs is not None or trainer.optimizer is not None:
            raise ValueError(
                f"shampoo4: leave out {', '.join(given) or f'optimizer: {cfg.optimizer}'}, it has no effect"
            )
        _, options = shampoo4(trainer.args, **cfg.shampoo4)
        trainer.optimizer_cls_and_kwargs = (_Factory, options)
        if not isinstance(trainer, PortableStates):
            trainer.add_callback(ConsolidateStates())


class _Factory(Shampoo4Factory):
    """Called by axolotl with the Trainer's arguments in second place."""

    def __call__(self, model: nn.Module, _: Any = None, **options: Any) -> Shampoo4:
        return super().__call__(model, **options)
