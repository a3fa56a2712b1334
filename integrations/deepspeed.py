"""DeepSpeed: importing this makes ``"Shampoo4"`` an optimizer type of its configuration, under ZeRO 0, 1, 2 and 3.

::

    import sharded_shampoo4.integrations.deepspeed

    {"optimizer": {"type": "Shampoo4", "params": {"lr": 1e-3, "weight_decay": 0.05}}, ...}

Import it before ``deepspeed.initialize`` or ``Accelerator(...)``: without the import DeepSpeed says "AssertionError:
Shampoo4 is not a supported DeepSpeed Optimizer". An optimizer that the program makes itself works as
well, without this import: ``deepspeed.initialize(model=model, optimizer=Shampoo4(...), ...)``; ZeRO then asks for
``"zero_allow_untested_optimizer": true``, which this import makes unnecessary too. All else is found at the first step
(:mod:`.zero`).

What to know of DeepSpeed (0.19.8): ``gradient_clipping`` is 1.0 unless the configuration says otherwise, and parameters
without a gradient get one of zeros.
"""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped]
from deepspeed.ops import __compatible_ops__  # type: ignore[import-untyped]
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS  # type: ignore[import-untyped]

from sharded_shampoo4 import Shampoo4

NAMES = ("Shampoo4", "shampoo4")  # DeepSpeed looks up unknown types in torch.optim


def register() -> None:
    """Let DeepSpeed's configuration name ``Shampoo4``, also in lower case, and ZeRO take it as one of those it knows.

    Raises:
        RuntimeError: torch.optim has another optimizer of this name.
    """
    for name in NAMES:
        existing = getattr(torch.optim, name, Shampoo4)
        if existing is not Shampoo4:
            raise RuntimeError(
                f"torch.optim.{name} is {existing!r}: this name in a DeepSpeed configuration means that one"
            )
        setattr(torch.optim, name, Shampoo4)
    if Shampoo4 not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(Shampoo4)


def skip_cpu_compilation() -> None:
    """On CPUs, keep DeepSpeed from compiling its shared-memory collectives when it starts; gloo does their work.

    Compiling takes minutes and fails without a compiler. Where there is an accelerator nothing changes. Call it before
    ``deepspeed.init_distributed``, ``deepspeed.initialize`` or ``Accelerator(...)``.
    """
    if get_accelerator().device_name() == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False


register()
