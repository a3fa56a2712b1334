"""Frameworks, found among the callers of an optimizer. Nothing here imports them.

Accelerate and the Trainer of transformers are looked for because under DDP they save ``state_dict()`` without
:meth:`Shampoo4.consolidate_state_dict`, which fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from sharded_shampoo4.hosts import Host

DEEPSPEED_ENGINE = "deepspeed.runtime.engine"
_SAVED_IN_PARTS = ("FSDP", "DEEPSPEED")  # Accelerate's types: there every rank saves what it has


def callers(module: str) -> Iterator[Any]:
    """Give the objects whose methods, defined in ``module``, are running, the innermost first."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == module and "self" in frame.f_locals:
            yield frame.f_locals["self"]


class AccelerateHost(Host):
    """Accelerate. It leaves parameters to DDP, FSDP and DeepSpeed, whose hosts answer for them."""

    @staticmethod
    def saving_advice(optimizer: Optimizer) -> str:
        """Return what to do if an Accelerator or a Trainer that is calling ``optimizer`` will fail to save it."""
        handle = next((handle for handle in callers("accelerate.optimizer") if handle.optimizer is optimizer), None)
        if handle is None or handle.accelerator_state.distributed_type.value in _SAVED_IN_PARTS:
            return ""
        trainer = next(callers("transformers.trainer"), None)
        if trainer is None:
            return (
                "accelerator.save_state() will fail: each rank has a part of Shampoo4's states. Use the "
                "PortableAccelerator of sharded_shampoo4.integrations.accelerate, or its "
                "consolidate_before_saving(accelerator, optimizer). sharded_shampoo4.checkpoint.save() works as it is"
            )
        if trainer.args.save_strategy == "no" or trainer.args.save_only_model:
            return ""
        return (
            "the Trainer's first checkpoint will fail: each rank has a part of Shampoo4's states. Use the "
            "PortableTrainer of sharded_shampoo4.integrations.transformers, or its callback ConsolidateStates()"
        )
