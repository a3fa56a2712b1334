"""timm: importing this makes ``shampoo4`` a name of its optimizers.

    import sharded_shampoo4.integrations.timm

    optimizer = timm.optim.create_optimizer_v2(model, "shampoo4", lr=2e-3, weight_decay=0.05, layer_decay=0.75)

timm makes groups without names. Checkpoints take names from the model; for names in messages make the groups first:

    groups = with_names(model, timm.optim.param_groups_weight_decay(model, 0.05))
    optimizer = timm.optim.create_optimizer_v2(groups, "shampoo4", lr=2e-3)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from timm.optim._optim_factory import OptimInfo, default_registry
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.base_options import base_class


def shampoo4(params: Iterable[Any], **options: Any) -> Shampoo4:
    """Make a ``Shampoo4`` of what timm passes.

    Args:
        params: tensors or groups. Groups with timm's ``use_fallback`` (``fallback_list=``) are left to the base.
        **options: of :class:`Shampoo4`. timm always passes ``momentum``, which bases without it do not get.
    """
    if "momentum" not in inspect.signature(base_class(options.get("base", "adamw"))).parameters:
        options.pop("momentum", None)
    groups = [_plain(group) if isinstance(group, dict) else group for group in params]
    return Shampoo4(groups, **options)


def with_names(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``groups`` of parameters of ``model`` with the names of the parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The group without timm's word for parameters that a matrix method leaves to another optimizer."""
    group = dict(group)
    if group.pop("use_fallback", False) and group.setdefault("precondition", False):
        raise ValueError("a group has use_fallback and precondition=True: leave one of them out")
    return group


default_registry.register(
    OptimInfo(
        name="shampoo4",
        opt_class=shampoo4,
        description="SOAP and 4-bit Shampoo, sharded over all ranks",
        has_momentum=True,
        has_betas=True,
    )
)
