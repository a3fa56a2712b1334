"""What is launched: the files of launch/configs that test_accelerate.py trains with, and what each must run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .launching import free_port

HOSTS = {
    "ddp": "DDP on 2 processes",
    "fsdp2": "FSDP2 on 2 processes",
    "zero2": "ZeRO-2 on 2 processes",
    "zero3": "ZeRO-3 on 2 processes",
}


LAUNCHERS = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2),
    "deepspeed": (Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port", free_port()),
}
# Launcher, file of launch/configs, and what is changed in it: by each way that needs no file for Accelerate.
BY_JSON: dict[str, tuple[str, str, dict[str, Any]]] = {
    "named in the file": ("torchrun", "zero3", {}),
    "the deepspeed launcher": ("deepspeed", "zero2", {}),
    "the script's, offloaded": (
        "torchrun",
        "zero2",
        {"optimizer": None, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    ),
}
CONFIGS = {"ddp": "DDP on 2 processes", "fsdp1": "FSDP1 on 2 processes", "hsdp": "HSDP 2x2 on 4 processes"}
