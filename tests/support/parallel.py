"""A small Llama and experts on meshes of several dimensions: FSDP2 with tensor or expert parallelism, and HSDP."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from . import worlds as hosts

# Shapes of meshes by names of layouts. "none" is one process.
LAYOUTS: dict[str, tuple[int, ...]] = {
    **{"fsdp2": (4,), "tp": (2, 2), "tp alone": (1, 4)},
    **{"hsdp and tp": (2, 1, 2), "all of them": (2, 2, 2)},
}
_NAMES = ("replicate", "shard", "tp")
# Whether distribute_tensor() and full_tensor() know the rows of uneven parts of a dimension that is cut twice. Those of
# torch 2.9 take them for others.
KNOWS_UNEVEN_PARTS = Version(torch.__version__).release >= (2, 13)


def make_llama() -> nn.Module:
    """A Llama with biases. Its vocabulary and hidden sizes are odd, so that shards are uneven, if torch knows these."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary, hidden, intermediate, heads, size = (37, 18, 27, 3, 6) if KNOWS_UNEVEN_PARTS else (40, 32, 24, 4, 8)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=size,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_gradients(step: int) -> dict[str, Tensor]:
    """Global gradients of all parameters of the Llama."""
    generator = torch.Generator().manual_seed(step)
    shapes = {name: parameter.shape for name, parameter in make_llama().named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def wrap(model: nn.Module, layout: str, lm_head: bool = True) -> nn.Module:
    """Shard a Llama; ``lm_head`` tells whether tensor parallelism takes part in the head and the embedding."""
    if layout == "none":
        return model
    shape = LAYOUTS[layout]
    if len(shape) == 1:
        return _fully_shard(model, init_device_mesh("cpu", shape))
    names = _NAMES[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    plan: dict[str, Any] = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    if lm_head:
        plan |= {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return _fully_shard(model, mesh[names[:-1]])


def _fully_shard(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def advance(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Tensor]:
    """Replay gradients, and return the whole parameters; collective."""
    for step in steps:
        hosts.set_gradients(model, "fsdp2", make_gradients(step))
        optimizer.step()
    return hosts.full_parameters(model, "fsdp2")


class Experts(nn.Module):
    """A stack of weights, as torchtitan has it, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(10, 5)
        self.w1 = nn.Parameter(torch.randn(5, 10, 12))
        self.w2 = nn.Parameter(torch.randn(5, 12, 10))


def wrap_experts(model: Experts, dimension: int, mesh: DeviceMesh) -> nn.Module:
    """Give each part of ``mesh["ep"]`` some experts, and shard a ``dimension`` of these by FSDP2."""
    for name in ("w1", "w2"):
        whole = getattr(model, name).detach()
        setattr(model, name, nn.Parameter(distribute_tensor(whole, mesh["ep"], [Shard(0)], src_data_rank=None)))

    def placement(parameter: Any) -> Shard | None:
        return Shard(dimension) if isinstance(parameter, DTensor) else None

    return fully_shard(model, mesh=mesh["shard"], shard_placement_fn=placement)
