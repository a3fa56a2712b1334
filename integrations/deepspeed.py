"""DeepSpeed: importing this makes ``"Shampoo4"`` an optimizer type of its configuration, under ZeRO 0, 1, 2 and 3.

::

    import sharded_shampoo4.integrations.deepspeed

    {"optimizer": {"type": "Shampoo4", "params": {"lr": 1e-3, "weight_decay": 0.05}}, ...}

``"groups"`` among the params gives some parameters other options, by patterns of their names::

    "groups": [{"pattern": "embed|lm_head", "precondition": false}, {"pattern": "qkv", "split_rows": 3}]

Import it before ``deepspeed.initialize`` or ``Accelerator(...)``: without the import DeepSpeed says "AssertionError:
Shampoo4 is not a supported DeepSpeed Optimizer". An optimizer that the program makes itself works as
well, without this import: ``deepspeed.initialize(model=model, optimizer=Shampoo4(...), ...)``; ZeRO then asks for
``"zero_allow_untested_optimizer": true``, which this import makes unnecessary too. All else is found at the first step
(:mod:`.zero`).

What to know of DeepSpeed (0.19.8): ``gradient_clipping`` is 1.0 unless the configuration says otherwise, and parameters
without a gradient get one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped]
from deepspeed.ops import __compatible_ops__  # type: ignore[import-untyped]
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS  # type: ignore[import-untyped]
from torch import nn
from torch.optim import Optimizer

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.base_options import base_arguments, base_class
from sharded_shampoo4.names import plain_name
from sharded_shampoo4.options import OPTION_NAMES

from .callers import DEEPSPEED_ENGINE, callers
from .views import grouped, matched

NAMES = ("Shampoo4", "shampoo4")  # DeepSpeed looks up unknown types in torch.optim
_KNOWN = (*OPTION_NAMES, "lr", "weight_decay", "preset")  # options that are not the base optimizer's


def shampoo4(params: Iterable[Any], groups: Sequence[Mapping[str, Any]] = (), **options: Any) -> Shampoo4:
    """Make what ``"Shampoo4"`` in DeepSpeed's configuration stands for.

    Args:
        params: tensors or param groups, as DeepSpeed passes them.
        groups: each a ``"pattern"``, a regular expression that is searched in parameters' names, and options for the
            parameters that it matches. The first pattern that matches a parameter counts. Its options win over those of
            a param group that the program has made.
        **options: of :class:`Shampoo4`.

    Raises:
        TypeError: an option in ``groups`` that is unknown.
        ValueError: a pattern matches no parameter, or only such as earlier patterns match; a tensor that is not in the
            model.
    """
    if not groups:
        return Shampoo4(params, **options)
    model = next(callers(DEEPSPEED_ENGINE)).module
    views = _by_name(model, groups, base_class(options.get("base", "adamw")))
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    given = list(params)
    made = given if isinstance(given[0], dict) else [{"params": given}]
    if any(parameter not in names for group in made for parameter in group["params"]):
        raise ValueError("groups: the param groups have a tensor that is no parameter of the model, so it has no name")
    parts = [
        {**group, **part}
        for group in made
        for part in grouped([(names[parameter], parameter) for parameter in group["params"]], views)
    ]
    return Shampoo4(parts, **options)


def _by_name(model: nn.Module, groups: Sequence[Mapping[str, Any]], base: type[Optimizer]) -> dict[str, dict[str, Any]]:
    """Return the options that ``groups`` give to parameters, by plain names."""
    found: dict[str, dict[str, Any]] = {}
    for entry in groups:
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
        pattern = options.pop("pattern", None)
        if not isinstance(pattern, str):
            raise ValueError(f'groups: each needs a "pattern", a regular expression, got {dict(entry)!r}')
        base_arguments(base, 0.0, 0.0, {name: value for name, value in options.items() if name not in _KNOWN})
        try:
            names = matched(model, pattern) - found.keys()
        except ValueError as error:
            raise ValueError(f"groups: {error}") from None
        if not names:
            raise ValueError(f"groups: {pattern!r} matches only parameters that earlier patterns match")
        found |= dict.fromkeys(names, options)
    return found


def register() -> None:
    """Let DeepSpeed's configuration name ``Shampoo4``, also in lower case, and ZeRO take it as one of those it knows.

    Raises:
        RuntimeError: torch.optim has another optimizer of this name.
    """
    for name in NAMES:
        existing = getattr(torch.optim, name, shampoo4)
        if existing is not shampoo4:
            raise RuntimeError(
                f"torch.optim.{name} is {existing!r}: this name in a DeepSpeed configuration means that one"
            )
        setattr(torch.optim, name, shampoo4)
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
