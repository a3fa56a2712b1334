"""The options of the preconditioner and of the base optimizer, checked when they are given."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from .values import like, not_negative, refuse_auto, to_boolean, to_integer, to_number, to_tuple, to_word

Bits = Literal[3, 4, 8, 32]
Quantize = Literal["eigenbasis", "preconditioner"]
CodeBook = Literal["linear2", "dynamic_tree", "normal"]
RefreshDtype = Literal["float64", "float32"]
Refresh = Literal["together", "staggered"]
Root = Literal["stored", "triangle", "implicit"]
ScaleDtype = Literal["float32", "bfloat16"]
LowDtype = Literal["float32", "bfloat16"]  # in which directions are multiplied, or gradients and directions travel
Split = Literal["even", "remainder"]
GraftingScope = Literal["parameter", "block", "none"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "bits": (3, 4, 8, 32),
    "quantize": ("eigenbasis", "preconditioner"),
    "codebook": ("linear2", "dynamic_tree", "normal"),
    "scale_dtype": ("float32", "bfloat16"),
    "root": ("stored", "triangle", "implicit"),
    "matmul_dtype": ("float32", "bfloat16"),
    "exchange_dtype": ("float32", "bfloat16"),
    "refresh": ("together", "staggered"),
    "refresh_iterations": (1, 2),
    "refresh_dtype": ("float64", "float32"),
    "split": ("even", "remainder"),
    "grafting": ("parameter", "block", "none"),
}
_LOWEST_INTEGER = {
    "quant_block_size": 1,
    "min_quant_numel": 0,
    "statistics_interval": 1,
    "root_interval": 1,
    "max_preconditioner_dim": 1,
    "max_failures": 1,
    "scratch_mib": 1,
}


@dataclass(frozen=True)
class PreconditionerOptions:
    """Everything that a parameter group may say of its preconditioner. :class:`Shampoo4` describes each field.

    Values may also stand as configuration files write them, such as ``"100"`` or ``100.0`` for 100.
    """

    precondition: bool = True
    bits: Bits = 4
    quantize: Quantize = "eigenbasis"
    codebook: CodeBook = "linear2"
    quant_block_size: int = 64
    scale_dtype: ScaleDtype = "float32"
    root: Root = "stored"
    min_quant_numel: int = 4096
    shampoo_beta: float = 0.95
    matrix_eps: float = 1e-6
    statistics_interval: int = 100
    root_interval: int = 500
    interval_warmup: bool = True
    refresh: Refresh = "together"
    rectify_steps: tuple[int, int] = (1, 4)
    refresh_iterations: int = 1
    refresh_dtype: RefreshDtype = "float64"
    max_preconditioner_dim: int = 1024
    split: Split = "even"
    grafting: GraftingScope = "parameter"
    max_failures: int = 10
    matmul_dtype: LowDtype = "float32"
    exchange_dtype: LowDtype = "float32"
    scratch_mib: int = 256
    compile: bool = False

    def __post_init__(self) -> None:
        self._convert()
        for name in ("precondition", "interval_warmup", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        for name, lowest in _LOWEST_INTEGER.items():
            check_integer(name, getattr(self, name), lowest)
        if not (_is_number(self.shampoo_beta) and 0.0 <= self.shampoo_beta < 1.0):
            raise ValueError(f"shampoo_beta must be in [0, 1), got {self.shampoo_beta!r}")
        if not (_is_number(self.matrix_eps) and 0.0 < self.matrix_eps < math.inf):
            raise ValueError(f"matrix_eps must be a positive number, got {self.matrix_eps!r}")
        steps = self.rectify_steps
        if not (isinstance(steps, (tuple, list)) and len(steps) == 2):
            raise ValueError(f"rectify_steps must be two integers, for a statistics and a root step, got {steps!r}")
        for count in steps:
            check_integer("rectify_steps", count, 0)
        if self.codebook == "normal" and self.quant_block_size < 2:
            raise ValueError("codebook='normal' needs a quant_block_size of at least 2: a block of 1 is its own scale")
        if self.root != "stored" and self.bits == 32:
            raise ValueError(f"root={self.root!r} is about low precision: bits=32 keeps its roots as they are")
        if self.root == "implicit" and self.quantize != "eigenbasis":
            raise ValueError(f"root='implicit' needs quantize='eigenbasis', got {self.quantize!r}")

    def _convert(self) -> None:
        """Replace values by what they mean. The checks refuse those that stay as they were."""
        for name, default in _DEFAULTS.items():
            given = getattr(self, name)
            refuse_auto(name, given, default)
            value = _CONVERTERS[type(default)](given)
            if isinstance(value, tuple):
                value = tuple(map(to_integer, value))
            object.__setattr__(self, name, value)

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> PreconditionerOptions:
        """The options that stand in a parameter group; the defaults for those that an older version did not know."""
        given = (group.get(name, default) for name, default in {**_DEFAULTS, **_BEFORE}.items())
        values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in given]  # which can be hashed
        try:
            return _cached(*values)
        except TypeError:  # a value that cannot be hashed cannot be right either: let the checks say so
            return cls(*values)

    def as_group(self) -> dict[str, Any]:
        """These options as plain values, to stand in a parameter group."""
        return asdict(self)

    def shaping_bytes(self) -> dict[str, Any]:
        """The options that decide how the stored bytes look: equal ones can read each other's states."""
        if not self.precondition:
            return {"precondition": False}
        names = ["precondition", "bits", "max_preconditioner_dim", "split"]
        if self.bits != 32:
            names += ["quantize", "codebook", "quant_block_size", "scale_dtype", "root", "min_quant_numel"]
        return {name: getattr(self, name) for name in names}

    def is_quantized(self, order: int) -> bool:
        """Whether a factor of this order is kept in low precision: decided by its order alone, never by a shard."""
        return self.bits != 32 and order * order >= self.min_quant_numel


PAPER_SETTINGS: dict[str, Any] = {
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
    "rectify_steps": (1, 4),
    "max_preconditioner_dim": 1200,
    "split": "remainder",
    "grafting": "parameter",
}
COMPACT_SETTINGS: dict[str, Any] = {
    "bits": 4,
    "quantize": "eigenbasis",
    "codebook": "normal",
    "quant_block_size": 64,
    "scale_dtype": "bfloat16",
    "root": "implicit",
    "rectify_steps": (1, 1),
}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(PreconditionerOptions)}
_BEFORE: dict[str, Any] = {"interval_warmup": False}  # what versions did that did not know the option
OPTION_NAMES = tuple(_DEFAULTS)
_CONVERTERS: dict[type, Any] = {bool: to_boolean, int: to_integer, float: to_number, str: to_word, tuple: to_tuple}
_cached = functools.lru_cache(maxsize=256, typed=True)(PreconditionerOptions)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


_BASES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}
_NOT_ELEMENTWISE = ("LBFGS", "Muon", "Adafactor", "SparseAdam")


def base_class(base: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer class that ``base`` names. Raises ValueError or TypeError, naming what would be accepted."""
    if isinstance(base, str):
        if base.lower() not in _BASES:
            names = ", ".join(map(repr, _BASES))
            hint = _class_hint(base) or _hint(base.lower(), _BASES)
            raise ValueError(f"base must be one of {names} or a torch optimizer class, got {base!r}{hint}")
        return _BASES[base.lower()]
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be a name or a subclass of torch.optim.Optimizer (not an instance), got {base!r}")
    if base.__module__.startswith("torch.optim") and base.__name__ in _NOT_ELEMENTWISE:
        raise ValueError(
            f"base={base.__name__} is not an elementwise rule on dense gradients, so it cannot take the direction "
            "of a sharded parameter; use 'adamw', 'sgd', 'adagrad' or another elementwise optimizer class"
        )
    return base


def _class_hint(base: str) -> str:
    """What to say of a name that torch.optim has a class for."""
    classes = {name.lower(): name for name, found in vars(torch.optim).items() if isinstance(found, type)}
    name = classes.get(base.lower())
    if name is None or name in _NOT_ELEMENTWISE or name == "Optimizer":
        return ""
    near = "; 'adamw' is Adam with decoupled weight decay" if name == "Adam" else ""
    return f": give the class itself, base=torch.optim.{name}{near}"


def base_arguments(
    rule: type[torch.optim.Optimizer], lr: Any, weight_decay: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments for ``rule``: learning rate, weight decay and ``options``.

    Raises:
        TypeError: an option that neither the preconditioner nor ``rule`` knows.
        ValueError: a value of the wrong type, or a negative learning rate or weight decay.
    """
    parameters = inspect.signature(rule).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name not in ("params", "lr", "weight_decay")]
    for name in options:
        if name not in known and not takes_any:
            raise TypeError(
                f"Shampoo4 got an unknown option {name!r}: it is neither an option of the preconditioner nor of "
                f"{rule.__name__}{_hint(name, [*OPTION_NAMES, *known, 'lr', 'weight_decay'])}"
            )
    arguments = {"lr": lr, **options}
    if "weight_decay" in parameters or takes_any:
        arguments["weight_decay"] = weight_decay
    elif to_number(weight_decay) != 0.0:
        raise TypeError(f"weight_decay={weight_decay!r} was given, but {rule.__name__} has no weight_decay")
    arguments = {name: _base_value(parameters, name, value) for name, value in arguments.items()}
    if arguments.get("differentiable"):
        raise ValueError("differentiable=True is not supported: gradients are preconditioned outside autograd")
    return arguments


def _base_value(parameters: Mapping[str, inspect.Parameter], name: str, value: Any) -> Any:
    """The value of a base optimizer's option, as its constructor takes it, which has these ``parameters``.

    Raises ValueError for one of the wrong type.
    """
    parameter = parameters.get(name)
    if name in ("lr", "weight_decay"):
        value = like(name, value, 1e-3 if name == "lr" else 0.0)
        not_negative(name, value)
        return value
    if parameter is None or parameter.default is parameter.empty:
        return value
    if value is None and any(word in str(parameter.annotation) for word in ("None", "Optional")):
        return value
    return like(name, value, parameter.default, whole=parameter.annotation in (int, "int"))


def stand_in() -> torch.nn.Parameter:
    """A parameter with which an optimizer can be made where its own are not known."""
    return torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))


def check_group(
    group: dict[str, Any], index: int, given: Iterable[str], base: torch.optim.Optimizer, arguments: Mapping[str, Any]
) -> None:
    """Check a parameter group's options and convert them, in place.

    An unknown key that looks like a misspelt option, or is another library's, raises TypeError. Others pass, as in
    torch: schedulers and training scripts keep notes of their own in groups.

    Args:
        group: with the values of all options.
        index: its number, for messages.
        given: the options that it was given itself.
        base: the base optimizer, which checks its own options by being made with them.
        arguments: with which ``base`` was made.
    """
    rule, own = type(base), [name for name in {**arguments, **base.defaults} if name in given]
    known = {*OPTION_NAMES, *arguments, *base.defaults, "lr", "weight_decay", "params", "param_names"}
    for key in group.keys() - known:
        hint = _hint(key, known, cutoff=0.85)
        if hint:
            raise TypeError(f"unknown option {key!r} in param group {index}{hint}")
    try:
        group.update(PreconditionerOptions.of_group(group).as_group())
        if own:
            parameters = inspect.signature(rule).parameters
            group.update({name: _base_value(parameters, name, group[name]) for name in own})
            rule([stand_in()], **{**arguments, **{name: group[name] for name in own}})
    except (TypeError, ValueError) as error:
        raise ValueError(f"param group {index}: {error}") from None


# What other libraries call an option, and what to write here.
_STEPS = "statistics_interval (T1, steps between statistics) and root_interval (T2, steps between inverse roots)"
_OTHER_NAMES = {
    **dict.fromkeys(("precondition_frequency", "preconditioning_frequency", "precondition_freq"), _STEPS),
    **dict.fromkeys(("precond_freq", "precond_frequency", "precond_update_freq", "update_precond_freq"), _STEPS),
    **dict.fromkeys(("update_freq", "update_frequency", "preconditioner_update_freq", "precond_interval"), _STEPS),
    **dict.fromkeys(("preconditioning_compute_steps", "precondition_every_n_steps"), _STEPS),
    **dict.fromkeys(("T1", "t1", "statistics_compute_steps", "stat_compute_steps"), "statistics_interval"),
    **dict.fromkeys(("T2", "t2", "prec_compute_steps", "root_compute_steps"), "root_interval"),
    **dict.fromkeys(
        ("start_preconditioning_step", "start_prec_step"), "root_interval: directions begin with the first"
    ),
    **dict.fromkeys(("block_size", "max_precond_dim", "max_precond_size", "prec_maxorder"), "max_preconditioner_dim"),
    **dict.fromkeys(("max_size_triangular", "max_dim"), "max_preconditioner_dim"),
    "precondition_1d": "never done: vectors go to the base optimizer, leave it out",
    "merge_dims": "always done: all dimensions after the first are one side of the matrix, leave it out",
    **dict.fromkeys(("shampoo_eps", "matrix_epsilon", "diagonal_epsilon", "precond_eps"), "matrix_eps"),
    **dict.fromkeys(("epsilon", "adam_epsilon"), "eps, of the base optimizer, or matrix_eps, of the inverse roots"),
    **dict.fromkeys(("beta1", "beta2", "adam_beta1", "adam_beta2"), "betas=(beta1, beta2), of the base optimizer"),
    **dict.fromkeys(("beta", "beta3", "stat_decay", "precond_beta", "preconditioner_beta"), "shampoo_beta"),
    **dict.fromkeys(("graft_type", "grafting_type", "grafting_config"), "grafting"),
    **dict.fromkeys(("prec_bits", "num_bits", "nbits"), "bits"),
    **dict.fromkeys(("quan_blocksize", "quant_blocksize", "quantization_block_size"), "quant_block_size"),
    **dict.fromkeys(("min_lowbit_size", "min_quant_size"), "min_quant_numel"),
    **dict.fromkeys(("rect_t1", "rect_t2"), "rectify_steps=(rect_t1, rect_t2)"),
    "learning_rate": "lr",
    "wd": "weight_decay",
    "use_nesterov": "nesterov, with base='sgd'",
    "use_decoupled_weight_decay": "base='adamw', whose weight decay is decoupled",
}


def _hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    if name in _OTHER_NAMES:
        return f"; here this is {_OTHER_NAMES[name]}"
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""
