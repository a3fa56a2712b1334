"""Presets: options to begin with, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, get_args

from .options import DEFAULTS, METHODS, Preset, choose
from .values import refuse_auto, to_integer, to_word

PRESET_HELP = (
    'Options to begin with: "compact", the smallest state, with eigenbases in 4 bits; the "paper"\'s, with '
    'method="shampoo"; "shampoo-compact", the smallest state with that method. An option that is given beside it wins.'
)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "method": "shampoo",
        "bits": 4,
        "quantize": "eigenbasis",
        "codebook": "linear2",
        "quant_block_size": 64,
        "min_quant_numel": 4096,
        "shampoo_beta": 0.95,
        "matrix_eps": 1e-6,
        "statistics_interval": 100,
        "root_interval": 500,
        "interval_warmup": False,
        "root": "rectified",
        "rectify_steps": (1, 4),
        "max_preconditioner_dim": 1200,
        "max_aspect": 0,
        "split": "remainder",
        "grafting": "parameter",
    },
    "compact": {
        "method": "soap",
        "bits": 4,
        "momentum_dtype": "int8",
        "second_moment_dtype": "factored",
    },
    "shampoo-compact": {
        "method": "shampoo",
        "bits": 4,
        "quantize": "eigenbasis",
        "codebook": "normal",
        "quant_block_size": 64,
        "scale_dtype": "bfloat16",
        "root": "implicit",
        "rectify_steps": (1, 1),
    },
}


def apply_preset(given: Mapping[str, Any], method: str = DEFAULTS["method"]) -> dict[str, Any]:
    """Add to the ``given`` options those of their ``"preset"``, and the defaults of their method.

    Options that are given themselves win over both.

    Args:
        given: options, and perhaps a preset, which is taken out.
        method: of options that give none, whose defaults are there already.

    >>> apply_preset({"preset": "paper", "lr": 0.1}) == {**METHODS["shampoo"], **PRESETS["paper"], "lr": 0.1}
    True
    >>> apply_preset({"bits": 4})
    {'rectify_steps': (1, 1), 'protect': True, 'bits': 4}

    Raises:
        ValueError: there is no such preset, or it is for another method than the one that is given.
    """
    options = dict(given)
    preset = to_word(options.pop("preset", None))
    if preset is not None:
        refuse_auto("preset", preset, "compact")
        choose("preset", preset, get_args(Preset))
        _check_method(preset, to_word(options.get("method")))
        options = {**PRESETS[preset], **options}
    chosen = to_word(options.get("method", method))
    defaults: dict[str, Any] = {}
    if isinstance(chosen, str) and chosen in METHODS and chosen != method:
        defaults = {name: DEFAULTS[name] for name in METHODS[method]} | METHODS[chosen]
    bits = to_integer(options.get("bits"))
    if chosen == "soap" and isinstance(bits, int):
        defaults |= {"rectify_steps": (1, 1) if bits < 8 else (0, 0), "protect": bits < 8}
    return {**defaults, **options}


def _check_method(preset: str, given: Any) -> None:
    """Raise ValueError if another method is ``given`` than that of a preset."""
    own = PRESETS[preset]["method"]
    if given in METHODS and given != own:
        others = " or ".join(repr(name) for name, options in PRESETS.items() if options["method"] == given)
        raise ValueError(
            f"preset={preset!r} is for method={own!r}, got method={given!r}: leave method out, or give preset={others}"
        )


_Constructor = TypeVar("_Constructor", bound=Callable[..., None])


def takes_preset(constructor: _Constructor) -> _Constructor:
    """Wrap a constructor: options that a call does not give are those of its ``preset``, where that has them.

    Parsers of command lines, such as LightningCLI's, give every option there is. In a call that does, options with the
    default value count as not given.
    """
    parameters = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(constructor)
    def constructed(*args: Any, **options: Any) -> None:
        if defaults.keys() <= options.keys():
            options = {k: value for k, value in options.items() if k not in defaults or value != defaults[k]}
        constructor(*args, **apply_preset(options))

    return cast(_Constructor, constructed)
