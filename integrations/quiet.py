"""Scripts without the warnings of other packages that nobody who starts them can act on.

::

    from sharded_shampoo4.integrations.quiet import quiet

    quiet()    # before transformers and DeepSpeed are imported

It needs nothing but torch.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch


def quiet() -> None:
    """Silence these warnings in this process.

    - DeepSpeed and FSDP1 call functions that torch 2.13 deprecates, and torch's DCP some that torch 2.9 deprecates.
    - FSDP2 warns of the view that a ViT's embedding returns.
    - DeepSpeed says that it has found no accelerator. Where there is none, the variable DS_ACCELERATOR says so first.
    - transformers imports torchao and bitsandbytes where they are installed. These warn of kernels for other machines,
      and torch of torchao's calls.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
