"""Reads off a model which of its parameters are several matrices: fused projections, heads, experts, convolutions.

::

    optimizer = Shampoo4(split_groups(model), lr=1e-3)
    print(optimizer.describe())                 # says how each parameter is seen

For models of transformers, whose configuration tells the number of heads, and for modules of torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sharded_shampoo4.names import plain_name
from sharded_shampoo4.planning.views import is_stack
from sharded_shampoo4.report import shorten

logger = logging.getLogger(__name__)

_QUERIES = ("q_proj", "query", "q_lin", "wq")
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "wk", "wv")
_JOINED = ("qkv", "qkv_proj", "Wqkv", "in_proj_weight")  # all queries, then all keys, then all values
_BY_HEADS = ("query_key_value",)  # query, key and value of the first head, then those of the second (GPT-NeoX)
_GATED = ("gate_up_proj", "gate_up")  # the gate, then the projection up


def split_groups(model: nn.Module, heads: bool = False) -> list[dict[str, Any]]:
    """Return the parameters of ``model`` that are trained, in groups by what they are seen as.

    Args:
        model: before or after it is wrapped, but before FSDP1 flattens it.
        heads: whether queries, keys and values are cut into heads, too.

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

    - ``split_rows`` for joined queries, keys and values, joined gate and up projections, in experts too; with
      ``heads`` for each head. Joined projections whose parts are columns, as in GPT-2, or alternate, as in the experts
      of GPT-OSS, stay as they are.
    - ``batch_dims=0`` for convolutions whose shape alone looks like a stack of matrices.

    Raises:
        ValueError: FSDP1 has flattened the parameters, so that their shapes are not those of the model.
    """
    sizes = _head_sizes(getattr(model, "config", None))
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if getattr(parameter, "_fsdp_flattened", False):
                raise ValueError(f"FSDP1 has flattened {name}: read the views off the model before it is wrapped")
            if options := _view(module, plain_name(name), parameter, sizes, heads):
                found[plain_name(name)] = options
    return found


def _view(module: nn.Module, name: str, parameter: Tensor, sizes: Mapping[str, int], heads: bool) -> dict[str, Any]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"batch_dims": 0} if is_stack(parameter.shape) else {}
    kind = _kind(name)
    if kind in _GATED and _is_by_rows(parameter, sizes.get("hidden", 0)):
        return {"split_rows": (2,)}
    if not isinstance(module, (nn.Linear, nn.MultiheadAttention)) or parameter.ndim != 2:
        return {}
    rows, size = parameter.shape[0], sizes.get("head", 0)
    if kind in _BY_HEADS or (heads and kind in (*_QUERIES, *_KEYS_AND_VALUES, *_JOINED)):
        return {"split_rows": (rows // size,)} if size and rows % size == 0 and rows > size else {}
    if kind in _JOINED:
        return _joined(rows, sizes)
    return {}


def _kind(name: str) -> str:
    """The name of the module that has a weight, or the last part of the name of another parameter."""
    *modules, last = name.split(".")
    return modules[-1] if last == "weight" and modules else last


def _is_by_rows(parameter: Tensor, hidden: int) -> bool:
    """Whether the two parts of a joined projection are rows: its columns are then what the model's hidden size is."""
    *_, rows, columns = parameter.shape if parameter.ndim > 1 else (0, 0)
    return columns == hidden and rows % 2 == 0 and (parameter.ndim == 2 or rows != hidden)


def _joined(rows: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    queries, others = sizes.get("queries", 0), sizes.get("keys", 0)
    if queries != others and queries + 2 * others == rows:
        return {"split_rows": (queries, others, others)}
    return {"split_rows": (3,)} if rows % 3 == 0 else {}


def _head_sizes(config: Any) -> dict[str, int]:
    """Rows of a head, of all queries and of all keys, and the hidden size, as far as a configuration tells them."""
    hidden, count = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int):
        return {}
    found = {"hidden": hidden}
    if isinstance(count, int):
        size = getattr(config, "head_dim", None) or hidden // count
        shared = getattr(config, "num_key_value_heads", None) or count
        found |= {"head": size, "queries": size * count, "keys": size * shared}
    return found
