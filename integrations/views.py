"""Reads off a model which of its parameters are several matrices: fused projections, heads, experts, convolutions.

::

    optimizer = Shampoo4(split_groups(model), lr=1e-3)
    print(optimizer.describe())                 # says how each parameter is seen

For models of transformers, whose modules and configurations tell the number of heads, and for modules of torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sharded_shampoo4.names import plain_name
from sharded_shampoo4.planning.views import is_stack
from sharded_shampoo4.report import shorten

logger = logging.getLogger(__name__)

_QUERIES_AND_KEYS = ("q_proj", "query", "q_lin", "wq", "k_proj", "key", "k_lin", "wk")
_VALUES = ("v_proj", "value", "v_lin", "wv")
_JOINED = ("qkv", "qkv_proj", "Wqkv", "in_proj_weight")  # all queries, then all keys, then all values
_BY_HEADS = ("query_key_value",)  # query, key and value of the first head, then those of the second (GPT-NeoX)
_JOINED_BY_HEADS = re.compile("CodeGenAttention|LightningAttention")  # whose qkv_proj is by heads, too
_GATED = ("gate_up_proj", "gate_up")  # the gate, then the projection up
_DOWN = {"gate_up_proj": "down_proj", "gate_up": "down"}  # what follows it
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}

# What attention modules call the rows of a head, the number of heads, and the number of heads of keys and values.
_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "dim_per_head")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


def split_groups(model: nn.Module, heads: bool = False) -> list[dict[str, Any]]:
    """Return the parameters of ``model`` that are trained, in groups by what they are seen as.

    Args:
        model: before or after it is wrapped, or inside another module, but before FSDP1 flattens it.
        heads: whether queries, keys and values are cut into heads, too, where their module tells how long these are.

    Returns:
        param groups for :class:`Shampoo4`, of named parameters, with the options of :func:`views_of`. What was found is
        logged.
    """
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return grouped(named, views_of(model, heads))


def grouped(named: Iterable[tuple[str, nn.Parameter]], views: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ``named`` parameters in groups by their options in ``views``, those without any first."""
    groups: dict[tuple[tuple[str, Any], ...], list[tuple[str, nn.Parameter]]] = {(): []}
    for name, parameter in named:
        groups.setdefault(tuple(views.get(name, {}).items()), []).append((name, parameter))
    for options, members in groups.items():
        if options:
            said = ", ".join(f"{name}={value}" for name, value in options)
            logger.info(f"{said} for {shorten(name for name, _ in members)} ({len(members)} in all)")
    return [{"params": members, **dict(options)} for options, members in groups.items() if members]


def matched(model: nn.Module, wanted: str | type[nn.Module]) -> set[str]:
    """Return the plain names of the parameters that ``wanted`` matches.

    Args:
        model: wrapped or not.
        wanted: a regular expression that is searched in names, in any name of a shared parameter; or a type of module.

    Raises:
        ValueError: it matches no parameter, or is no regular expression.
    """
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"{wanted!r} is no regular expression: {error}") from None
        named = model.named_parameters(remove_duplicate=False)
        found = {id(parameter) for name, parameter in named if pattern.search(plain_name(name))}
    else:
        modules = [module for module in model.modules() if isinstance(module, wanted)]
        found = {id(parameter) for module in modules for parameter in module.parameters()}
    if not found:
        raise ValueError(f"{wanted!r} matches no parameter of the model")
    return {plain_name(name) for name, parameter in model.named_parameters() if id(parameter) in found}


def views_of(model: nn.Module, heads: bool = False) -> dict[str, dict[str, Any]]:
    """Return options of :class:`Shampoo4` for the parameters that are not one matrix each, by plain names.

    - ``split_rows`` for joined queries, keys and values, joined gate and up projections, in experts too, and the gates
      of LSTMs and GRUs; with ``heads`` for each head, where the attention module tells the size of its heads. Joined
      projections whose parts are columns, as in GPT-2, or alternate, as in the experts of GPT-OSS, stay as they are.
      So do those whose rows do not agree with what is known of the heads. Where nothing is known, three times as many
      rows as columns are three parts.
    - ``batch_dims=0`` for convolutions whose shape or name alone looks like a stack of matrices.

    Modules are asked first, and then the configuration of the nearest module around them that has one.

    Raises:
        ValueError: FSDP1 has flattened the parameters, so that their shapes are not those of the model.
    """
    modules: dict[str, nn.Module] = {}
    configs: dict[str, dict[str, int]] = {}
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        plain = plain_name(path)  # that of a wrapper, which comes first, and of what it wraps
        around = plain.rpartition(".")[0]
        modules[plain] = module
        configs[plain] = _counts(getattr(module, "config", None)) or configs.get(plain) or configs.get(around, {})
        for name, parameter in module.named_parameters(path, recurse=False):
            if getattr(parameter, "_fsdp_flattened", False):
                raise ValueError(f"FSDP1 has flattened {name}: read the views off the model before it is wrapped")
            attention = module if isinstance(module, nn.MultiheadAttention) else modules.get(around, module)
            if options := _view(module, plain_name(name), parameter, _Heads.of(attention, configs[plain]), heads):
                found[plain_name(name)] = options
    return found


@dataclass(frozen=True)
class _Heads:
    """What is known of the heads of an attention module: 0 for what is not."""

    size: int  # rows of a head of queries or keys
    value_size: int
    count: int
    shared: int  # heads of keys, and of values
    config: Mapping[str, int]  # the same of the configuration, which may be that of other modules
    is_by_heads: bool  # joined projections are by heads, not by queries, keys and values

    @classmethod
    def of(cls, attention: nn.Module, config: Mapping[str, int]) -> _Heads:
        """Ask the module that has the projections."""
        count, width = _first(attention, _COUNTS), _first(attention, ("embed_dim",))
        size = _first(attention, _SIZES) or (width // count if count else 0)
        groups = _first(attention, ("num_key_value_groups",))
        shared = _first(attention, _SHARED_COUNTS) or ((count or config.get("count", 0)) // groups if groups else 0)
        by_heads = bool(_JOINED_BY_HEADS.search(type(attention).__name__))
        return cls(size, _first(attention, ("v_head_dim",)) or size, count, shared, config, by_heads)

    def joined(self, rows: int, columns: int, heads: bool) -> tuple[int, ...]:
        """The ``split_rows`` of joined queries, keys and values; empty if numbers do not confirm what they are."""
        size = self.size or self.config.get("size", 0)
        count = self.count or self.config.get("count", 0)
        own = bool(self.size and self.count)
        counts = [(rows // size - count) // 2] if own else [self.config.get("shared", 0), count]
        for shared in [self.shared] if self.shared else counts:
            if shared <= count and 0 < size * (count + 2 * shared) == rows and shared > 0:
                equal = (3,) if shared == count else (size * count, size * shared, size * shared)
                return (count + 2 * shared,) if heads else equal
        if own or self.shared or rows != 3 * columns:
            return ()
        size = self.size or (columns // self.count if self.count else 0)
        return (rows // size,) if heads and size and columns % size == 0 else (3,)


def _view(module: nn.Module, name: str, parameter: Tensor, known: _Heads, heads: bool) -> dict[str, Any]:
    shape = _shape(parameter)
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"batch_dims": 0} if is_stack(shape, name) else {}
    kind = _kind(name)
    if kind in _GATED:
        return _equal_parts(2, shape[-2]) if _is_by_rows(module, kind, shape) else {}
    if len(shape) != 2:
        return {}
    rows, columns = shape
    if kind.startswith(("weight_ih", "weight_hh")):
        return next((_equal_parts(count, rows) for cell, count in _GATES.items() if isinstance(module, cell)), {})
    if not isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return {}
    if kind in _BY_HEADS or (kind in _JOINED and known.is_by_heads):
        return _parts_of_size(known.size or known.config.get("size", 0), rows)
    if kind in _JOINED:
        parts = known.joined(rows, columns, heads)
        return {"split_rows": parts} if parts else {}
    size = known.size if kind in _QUERIES_AND_KEYS else known.value_size if kind in _VALUES else 0
    return _parts_of_size(size, rows) if heads else {}


def _kind(name: str) -> str:
    """The name of the module that has a weight, or the last part of the name of another parameter."""
    *modules, last = name.split(".")
    return modules[-1] if last == "weight" and modules else last


def _is_by_rows(module: nn.Module, kind: str, shape: Sequence[int]) -> bool:
    """Whether the two parts of a joined projection are rows: experts have then twice the columns of what follows."""
    if isinstance(module, nn.Linear):
        return len(shape) == 2
    down = getattr(module, _DOWN[kind], None)
    if len(shape) != 3 or not isinstance(down, Tensor):
        return False
    _, rows, columns = shape
    return _shape(down)[1:] == (
        columns,
        rows // 2,
    )  # the number of experts may differ: some of LongCat's have no weights


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """That of the whole parameter, also where ZeRO 3 has left it without elements."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _equal_parts(count: int, rows: int) -> dict[str, Any]:
    return {"split_rows": (count,)} if rows % count == 0 and rows > count else {}


def _parts_of_size(size: int, rows: int) -> dict[str, Any]:
    return {"split_rows": (rows // size,)} if size and rows % size == 0 and rows > size else {}


def _first(module: nn.Module, names: Iterable[str]) -> int:
    """The first of the attributes called ``names`` that is a number, not a list of those of several layers; or 0."""
    return next((value for name in names if (value := _number(getattr(module, name, None)))), 0)


def _number(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _counts(config: Any) -> dict[str, int]:
    """The rows of a head, and the numbers of heads of queries and of keys, as far as a configuration tells them.

    Empty for other objects: then the configuration of the module around counts.
    """
    try:
        hidden, count = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        size, shared = getattr(config, "head_dim", None), getattr(config, "num_key_value_heads", None)
    except RuntimeError:  # transformers does not tell what differs from layer to layer, as in Gemma 4
        return {"count": 0}
    if not isinstance(hidden, int):
        return {}
    heads = _number(count)
    if not heads:
        return {"count": 0}
    return {"size": _number(size) or hidden // heads, "count": heads, "shared": _number(shared) or heads}
