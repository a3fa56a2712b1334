"""Accelerate on machines without an accelerator, and checks of what runs; for launch scripts.

::

    rehearse_on_cpu()                                        # before the Accelerator is made
    accelerator = PortableAccelerator()
    adjust_deepspeed(accelerator, gradient_clipping=1.0)     # before prepare(); does nothing without DeepSpeed
    model, prepared = accelerator.prepare(model, optimizer)  # together: FSDP2 replaces the optimizer's parameters
    check_distribution(accelerator, model, optimizer)

Why: on a machine without an accelerator ``accelerate launch`` starts all processes, but each of them believes itself
alone, and FSDP falls back to DDP; neither is an error (Accelerate 1.15). Under DeepSpeed, Accelerate replaces any
optimizer that is offloaded by DeepSpeed's Adam, and gradients are clipped by DeepSpeed, never by ``clip_grad_norm_()``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, parse_flag_from_env, patch_environment  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sharded_shampoo4.hosts import reshard

from .accelerate import keep_offloaded

logger = logging.getLogger(__name__)

_ALONE = "one process"


def rehearse_on_cpu(timeout: timedelta | None = None) -> bool:
    """Let the coming ``Accelerator`` run what the launcher asks for, over gloo, where there is no accelerator.

    DDP, FSDP1, FSDP2, HSDP and DeepSpeed then do on CPUs what they would do on GPUs, only slower. Call it before
    ``Accelerator(...)``, which must not be given ``cpu=True``. FSDP has to be asked for by the launch configuration
    rather than by a plugin. Where there is an accelerator, or no launcher, nothing happens.

    Args:
        timeout: how long a process waits for one that does not answer; 30 minutes by default. (On accelerators:
            ``Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=...)])``.)

    Returns:
        Whether this is a rehearsal. The main process logs it.

    Raises:
        RuntimeError: Accelerate's state exists already, so that it is too late.
    """
    if torch.accelerator.is_available() or "LOCAL_RANK" not in os.environ:
        return False
    if PartialState._shared_state:
        raise RuntimeError("rehearse_on_cpu() comes too late: call it before Accelerator(...) and PartialState(...)")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, would warn that it found none
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        from .deepspeed import skip_cpu_compilation

        skip_cpu_compilation()
    with patch_environment(ACCELERATE_TORCH_DEVICE="cpu"):  # it would be cpu:0 otherwise, which FSDP1 refuses
        state = PartialState(cpu=True, backend="gloo", **({"timeout": timeout} if timeout else {}))
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # Accelerate promotes processes with accelerators to FSDP, and none else. The device stays the CPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    if state.is_main_process:
        logger.warning(f"No accelerator here: rehearsing on the CPU, {_processes(state.num_processes)} over gloo")
    return True


def adjust_deepspeed(accelerator: Accelerator, gradient_clipping: float) -> bool:
    """Make DeepSpeed's configuration say what the program does. Call it before ``prepare()``.

    Nothing happens without DeepSpeed. There gradients are clipped by DeepSpeed alone, by default at 1.0. An optimizer
    that the program brings stays what it is if it is offloaded. A model at stage 3 can be saved whole, whatever the
    configuration says. ``"Shampoo4"`` becomes a type of optimizer.

    Args:
        accelerator: not yet used to prepare anything.
        gradient_clipping: largest norm of the gradient; 0 does not clip.

    Returns:
        Whether DeepSpeed's configuration names the optimizer, for which ``accelerate.utils.DummyOptim`` stands in.

    Raises:
        ValueError: the configuration states another ``gradient_clipping``.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if accelerator.distributed_type != DistributedType.DEEPSPEED or plugin is None:
        return False
    from . import deepspeed as _register  # noqa: F401

    config = plugin.deepspeed_config
    stated = config.get("gradient_clipping", "auto")
    if stated != "auto" and float(stated) != gradient_clipping:
        raise ValueError(
            f"DeepSpeed's configuration has gradient_clipping={stated}, but the program clips at {gradient_clipping}: "
            'make them equal, or leave it out of the configuration (or "auto" there)'
        )
    config["gradient_clipping"] = gradient_clipping
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if int(zero.get("stage", 0)) == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # which plugins set to False if nobody asks for it
    if "optimizer" in config:
        return True
    keep_offloaded(plugin)
    return False


@contextlib.contextmanager
def whole_models(accelerator: Accelerator) -> Iterator[None]:
    """Have transformers make whole models in here, also under ZeRO 3, unless ``zero3_init_flag`` is set.

    Otherwise it partitions every model at birth as soon as a ZeRO 3 configuration exists, whatever the flag says, and
    its weights then begin with other random numbers than elsewhere.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.is_zero3_init_enabled():
        yield
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def inner_optimizer(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Optimizer:
    """Return the optimizer in what ``prepare()`` gave back; DeepSpeed's own if its configuration named it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        optimizer = model.basic_optimizer
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def check_distribution(accelerator: Accelerator, model: nn.Module, optimizer: Any = None) -> None:
    """Compare what the launcher asked for with what runs. ``model`` is what ``prepare()`` gave back.

    Args:
        accelerator: that prepared them.
        model: what ``prepare()`` gave back.
        optimizer: the one that the program gave to ``prepare()``, if it made one.

    Raises:
        RuntimeError: they differ in the number of processes, in what shards the model, or in the mesh; it names both.
            Also if some parameters of an FSDP2 model are not sharded (unless modules to ignore are configured), or if
            DeepSpeed runs another optimizer.
    """
    reshard(model)
    asked, got = _asked(accelerator), describe_distribution(accelerator, model)
    if asked != got:
        raise RuntimeError(
            f"asked for {asked}, got {got} (Accelerate's type: {accelerator.distributed_type.value}, device: "
            f"{accelerator.device}). Without an accelerator, call rehearse_on_cpu() before Accelerator(...)"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and isinstance(optimizer, Optimizer):
        running = inner_optimizer(accelerator, model, optimizer)
        if optimizer is not running:
            raise RuntimeError(
                f"asked for {type(optimizer).__name__}, but {type(running).__name__} runs: Accelerate replaces "
                "optimizers that are offloaded. Call adjust_deepspeed() before prepare()"
            )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.ignored_modules is None:
        whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if whole:
            raise RuntimeError(
                f"asked for {asked}, but {len(whole)} parameters are not sharded: {', '.join(whole[:5])}"
            )


def describe_distribution(accelerator: Accelerator, model: nn.Module) -> str:
    """Tell what runs, in words such as ``FSDP2 on 2 processes``, by the prepared model, not by the configuration."""
    return _in_words(_kind(accelerator, model), accelerator.num_processes)


def full_state_dict(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """Collect the whole model's state, at least on the main process: ``accelerator.get_state_dict(model)``. Collective.

    FSDP1 on the CPU takes another way: Accelerate's ends in a segmentation fault there (torch 2.13).
    """
    state: dict[str, Any]
    if isinstance(model, FullyShardedDataParallel) and accelerator.device.type == "cpu":
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    else:
        state = accelerator.get_state_dict(model)
    return state


def _asked(accelerator: Accelerator) -> str:
    """What the launcher's environment, or a plugin, asks for."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)  # there only if DeepSpeed runs
        stage = plugin.zero_stage if plugin else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return _in_words(f"ZeRO-{stage}", processes)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return _in_words("DDP" if processes > 1 else _ALONE, processes)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # there only if FSDP runs
    version = plugin.fsdp_version if plugin else os.environ.get("FSDP_VERSION", "")
    mesh = accelerator.parallelism_config
    if mesh is not None and mesh.dp_replicate_size > 1:
        return _in_words(f"HSDP {mesh.dp_replicate_size}x{mesh.dp_shard_size * mesh.cp_size}", processes)
    return _in_words(f"FSDP{version}", processes)


def _kind(accelerator: Accelerator, model: nn.Module) -> str:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine: Any = model
        return f"ZeRO-{engine.zero_optimization_stage()}"
    if isinstance(model, DistributedDataParallel):
        return "DDP" if accelerator.num_processes > 1 else _ALONE
    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    shards = (p for p in model.parameters() if isinstance(p, DTensor))
    first = next(shards, None)
    if first is None:
        return _ALONE if accelerator.num_processes == 1 else "unconnected models"
    sizes = list(zip(first.placements, first.device_mesh.shape, strict=True))
    replicas = math.prod(size for placement, size in sizes if placement.is_replicate())
    return f"HSDP {replicas}x{first.device_mesh.size() // replicas}" if replicas > 1 else "FSDP2"


def _in_words(kind: str, processes: int) -> str:
    return kind if kind == _ALONE and processes == 1 else f"{kind} on {_processes(processes)}"


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"
