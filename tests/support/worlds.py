"""The harness of the contract suite: ranks on gloo, hosts that wrap small models, and gradients to replay on them.

Knows nothing of the optimizer under test.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

HOSTS = ("ddp", "fsdp1", "fsdp2", "hsdp")  # each function below also takes "none": one process
PRELOADED = [  # by what starts ranks: what each of them would spend up to six seconds on
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "support.zero_worlds"),
]
PRELOADED_FOR_LAUNCHES = [  # by what starts the workers of forked.py
    *PRELOADED,
    *("torch.distributed.run", "torch.distributed.checkpoint", "torch.utils.tensorboard", "safetensors.torch"),
    *("sklearn.datasets", "datasets", "matplotlib.pyplot", "kornia.augmentation", "accelerate"),
    *("transformers.models.vit.modeling_vit", "transformers.trainer", "support.launching", "train_vit"),
]


def said(function: Callable[[], object]) -> str:
    """The error that ``function`` raises, in words."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().contiguous()
        found.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class RankError(RuntimeError):
    """A rank failed, or the ranks did not end in time."""


def preloaded_context(modules: list[str]) -> multiprocessing.context.ForkServerContext:
    """What forks processes from a server that has loaded ``modules``, if it is the first to start that server.

    There is one server for a process. It finds modules by the environment's PYTHONPATH. A process of pytest-xdist runs
    files of every kind: its server loads all modules, whichever file comes first.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes of its own: nothing is compiled
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_FOR_LAUNCHES if "PYTEST_XDIST_WORKER" in os.environ else modules)
    return context


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the ranks do: the number of threads is part of the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _remembered(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any] | RankError:
    try:
        return run_ranks(world_size, function, *args)
    except RankError as error:
        return error


def run_ranks_once(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Like :func:`run_ranks`, but a second call with equal arguments gives the first one's results, or its error."""
    results = _remembered(world_size, function, *args)
    if isinstance(results, RankError):
        raise results
    return results


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Run ``function(rank, *args)``, a module's own, in as many gloo processes; returns what they return, by rank.

    Raises RankError with the traceback of the rank that failed first, or after ``timeout`` seconds. No process is left.
    """
    context = preloaded_context(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        store, pipes, processes = f"{folder}/store", [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(there, rank, world_size, store, function, args), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"{len(waiting)} ranks did not end in {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "it ended without a word"
            if not succeeded:
                raise RankError(f"rank {rank} of {len(pipes)} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe: Any, rank: int, size: int, store: str, function: Callable[..., Any], args: Any) -> None:
    gc.freeze()  # DeepSpeed collects garbage for every engine: not in what is preloaded, which takes most of a second
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        answer = (True, function(rank, *args))
        dist.barrier()  # no rank leaves while another still needs it
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))


# -- hosts -------------------------------------------------------------------------------------------------------------


def make_mesh(*shape: int) -> DeviceMesh:
    """A CPU mesh of all ranks, with the names that HSDP asks for."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def wrap(model: nn.Module, host: str, **options: Any) -> nn.Module:
    """Shard ``model``: its ``units``, then the rest. ``options`` go to the wrapper."""
    if host == "none":
        return model
    if host == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True, **options)
    units = list(getattr(model, "units", []))
    if host == "fsdp1":
        options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
        for name, child in list(model.named_children()):
            if child in units:
                setattr(model, name, FullyShardedDataParallel(child, **options))
        return FullyShardedDataParallel(model, **options)
    size = dist.get_world_size()
    if "mesh" not in options:
        shape = (size,) if host == "fsdp2" else (size // 2, 2) if size % 2 == 0 else (1, size)
        options["mesh"] = make_mesh(*shape)
    for unit in units:
        fully_shard(unit, **options)
    return fully_shard(model, **options)


def named(model: nn.Module, host: str) -> dict[str, nn.Parameter]:
    """Parameters by their names before wrapping, tied weights once."""
    marks = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|^module)\.")
    plain = {}
    for name, parameter in model.named_parameters():
        while (shorter := marks.sub("", name)) != name:
            name = shorter
        plain[name] = parameter
    return plain


def set_gradients(model: nn.Module, host: str, gradients: dict[str, Tensor | None]) -> None:
    """Give every rank its shards of these global gradients; names that are missing get None."""
    parameters = named(model, host)
    if unknown := gradients.keys() - parameters.keys():
        raise KeyError(f"no such parameters: {sorted(unknown)}")
    if host == "fsdp1":
        whole = full_parameters(model, host)
        with FullyShardedDataParallel.summon_full_params(model, writeback=True):  # FSDP itself does the cutting
            for name, parameter in named(model, host).items():
                gradient = gradients.get(name)
                parameter.data.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        shards = {name: parameter.detach().clone() for name, parameter in named(model, host).items()}
        with FullyShardedDataParallel.summon_full_params(model, writeback=True):
            for name, parameter in named(model, host).items():
                parameter.data.copy_(whole[name])
        for name, parameter in named(model, host).items():
            held = gradients.get(name) is not None and parameter.numel() > 0
            parameter.grad = shards[name].view_as(parameter) if held else None
        return
    for name, parameter in parameters.items():
        gradient = gradients.get(name)
        if gradient is None:
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            parameter.grad = _shard_like(gradient, parameter)
        else:
            parameter.grad = gradient.clone()


def _shard_like(whole: Tensor, parameter: DTensor) -> DTensor:
    from torch.distributed.tensor import distribute_tensor

    sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local = sharded.to_local().clone()
    shape, stride = sharded.shape, sharded.stride()
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=stride
    )


def full_parameters(model: nn.Module, host: str) -> dict[str, Tensor]:
    """Copies of the whole parameters on every rank; collective."""
    if host == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in named(model, host).items()}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named(model, host).items()
    }


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """A forward and a backward pass."""
    inputs, targets = batch
    loss = (model(inputs).float() - targets).square().mean()
    loss.backward()
    return loss.item()


# -- models ------------------------------------------------------------------------------------------------------------

KINDS = ("mlp", "vit", "tied", "bf16", "experts")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(20, 44), nn.LayerNorm(44)
        self.middle, self.head = nn.Linear(44, 101), nn.Linear(101, 10)
        self.units = [self.middle]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.norm(self.stem(x)))))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(44), nn.Linear(44, 101), nn.Linear(101, 44)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Vit(nn.Module):
    """A convolution, a class token and a position, blocks, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 44, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, 44))
        self.position = nn.Parameter(torch.randn(1, 5, 44))
        self.first, self.second = Mixer(), Mixer()
        self.frozen = nn.Linear(44, 44).requires_grad_(False)
        self.unused = nn.Linear(7, 9, bias=False)
        self.head = nn.Linear(44, 10)
        self.units = [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.frozen(self.second(self.first(x)))[:, 0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(13, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.units = [self.middle]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(x))))


class Experts(nn.Module):
    """A fused projection, an adapter of low rank and a stack of experts, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.down, self.up = nn.Linear(20, 96), nn.Linear(96, 3, bias=False), nn.Linear(3, 96, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 13, 96))
        self.experts_bias = nn.Parameter(torch.randn(3, 13))
        self.head = nn.Linear(13, 10)
        self.units = [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.qkv(x))
        x = x + self.up(self.down(x))
        return self.head(torch.tanh(torch.einsum("bi,eoi->bo", x, self.experts) + self.experts_bias.sum(0)))


def make_model(kind: str, seed: int = 0) -> nn.Module:
    """A small model whose shards are uneven, and some empty, at 2, 3 and 4 ranks."""
    torch.manual_seed(seed)
    model = {"mlp": Mlp, "vit": Vit, "tied": Tied, "bf16": Mlp, "experts": Experts}[kind]()
    return model.to(torch.bfloat16) if kind == "bf16" else model


def make_batch(kind: str, seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "tied":
        return torch.randint(13, (size,), generator=generator), torch.randn(size, 13, generator=generator)
    shape = (size, 3, 6, 6) if kind == "vit" else (size, 20)
    inputs = torch.randn(shape, generator=generator)
    return inputs.to(torch.bfloat16) if kind == "bf16" else inputs, torch.randn(size, 10, generator=generator)


def make_gradients(kind: str, seed: int) -> dict[str, Tensor | None]:
    """Global gradients to replay: None for what is frozen or unused.

    Their values are few multiples of 3/8, so that sums and means of up to four equal ones are exact, in bfloat16 too.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in _model_on_meta(kind).items():
        gradient = (12 * torch.randn(parameter.shape, generator=generator)).round().clamp(-28, 28) * (3 / 8)
        trained = parameter.requires_grad and not name.startswith("unused")
        gradients[name] = gradient.to(parameter.dtype) if trained else None
    return gradients


@functools.cache
def _model_on_meta(kind: str) -> dict[str, nn.Parameter]:
    """The parameters of a model without their values."""
    with torch.device("meta"):
        return dict(make_model(kind).named_parameters())
