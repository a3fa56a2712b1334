"""Allocate a model, its gradients and Shampoo4's states on gloo processes, and count their bytes.

One forward and backward pass on a random input, then one step with intervals so long that no matrix is factorised: the
states of every parameter are then allocated, whatever they hold.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from memory_models import build, layers_of, random_batch, shapes_of
from memory_rules import Layout, Planner
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from wrapping import wrap

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.integrations.fsdp import local_tensor

_NEVER = 10**9  # steps
_IMPORTS = ["sharded_shampoo4", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.modeling_utils"]
_PROCESS = 10**9  # bytes of a process without a model, and of what its passes need


class Held(NamedTuple):
    """Bytes on one rank. DeepSpeed keeps no gradients that could be counted once it has taken its step: None."""

    weights: int
    gradients: int | None
    preconditioner: int
    base: int


def estimated(name: str, layout: Layout) -> list[Held]:
    """What each rank is expected to keep."""
    shapes = shapes_of(name)
    planner = Planner(shapes)
    gradients = None if layout.host.startswith("zero") else planner.gradients(layout)
    estimate = estimate_memory(shapes, layout.world_size, host=layout.host, replicas=layout.replicas)
    return [
        Held(planner.weights(layout), gradients, preconditioner, base)
        for preconditioner, base in zip(estimate.preconditioner, estimate.base, strict=True)
    ]


def measured(name: str, layouts: Sequence[Layout]) -> list[list[Held]]:
    """What each rank keeps, counted from its tensors, for each of ``layouts``, all of one world size, in turn.

    Raises MemoryError if the machine cannot hold all ranks.
    """
    for layout in layouts:
        check_room(name, layout)
    multiprocessing.set_forkserver_preload(_IMPORTS)
    (world_size,) = {layout.world_size for layout in layouts}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, name, layouts, folder)
        start_processes(_on_a_rank, arguments, nprocs=world_size, start_method="forkserver")
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(world_size)]
    return [[Held(*each) for each in of_ranks] for of_ranks in zip(*ranks, strict=True)]


def check_room(name: str, layout: Layout) -> None:
    """Raise MemoryError if all ranks of ``layout`` together need more than is free."""
    found = Planner(shapes_of(name)).footprint(layout, ["shampoo4"])
    buckets = found.gradients if layout.host != "none" else 0
    need = layout.world_size * (found.total("shampoo4") + buckets + _PROCESS)
    free = psutil.virtual_memory().available
    if need > free:
        raise MemoryError(
            f"{name} under {layout.host} on {layout.world_size} processes needs about {need / 1e9:.1f} GB of this "
            f"machine's memory, {free / 1e9:.1f} GB are free"
        )


def _on_a_rank(rank: int, world_size: int, name: str, layouts: Sequence[Layout], folder: str) -> None:
    """Take a step under each of ``layouts``, and leave this rank's bytes in ``folder``."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about its own collectives
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    held = []
    for layout in layouts:
        torch.manual_seed(0)
        model = build(name)
        step = _deepspeed_step if layout.host.startswith("zero") else _torch_step
        held.append(tuple(step(model, layout, random_batch(model))))
        del model
        gc.collect()
    torch.save(held, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _shampoo(model: nn.Module) -> Shampoo4:
    return Shampoo4(model.named_parameters(), statistics_interval=_NEVER, root_interval=_NEVER)


def _torch_step(model: nn.Module, layout: Layout, batch: Tensor) -> Held:
    if layout.host in ("none", "ddp"):
        for parameter in model.parameters():  # else a token's gradient is a view of the gradient of all tokens
            parameter.grad = torch.zeros_like(parameter)
    if layout.host != "none":
        model = wrap(model, layout.host, layers_of(model), copies=layout.copies)
    optimizer = _shampoo(model)
    model(batch).logits.float().square().mean().backward()
    weights = storage_bytes(map(local_tensor, model.parameters()))
    gradients = storage_bytes(local_tensor(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    state = optimizer.state_bytes()
    return Held(weights, gradients, state["preconditioner"], state["base"])


def _deepspeed_step(model: nn.Module, layout: Layout, batch: Tensor) -> Held:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read at the import
    import deepspeed  # type: ignore[import-untyped]

    from sharded_shampoo4.integrations.deepspeed import skip_cpu_compilation

    skip_cpu_compilation()
    for name, value in (("RANK", dist.get_rank()), ("LOCAL_RANK", dist.get_rank()), ("WORLD_SIZE", layout.world_size)):
        os.environ[name] = str(value)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(layout.host.removeprefix("zero"))},
    }
    deepspeed.init_distributed("gloo", verbose=False)
    optimizer = _shampoo(model)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    weights = storage_bytes([*own, *(getattr(p, "ds_tensor", p) for p in model.parameters())])
    engine.backward(engine(batch).logits.float().square().mean())
    engine.step()
    state = optimizer.state_bytes()
    engine.destroy()
    return Held(weights, None, state["preconditioner"], state["base"])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory under ``tensors``, with its padding; what they share is counted once."""
    storages: dict[int, Any] = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())
