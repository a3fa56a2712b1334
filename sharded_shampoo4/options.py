# ruff: noqa: RUF009 (fields are made by a function)
"""The preconditioner's options: the one place of their names, types, defaults, descriptions and checks.

The signature and docstring of :class:`Shampoo4`, the tables of README.md and launch/hyperparameters.md and the command
lines follow this file; ``tests/unit/test_options.py`` compares them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .planning.blocks import Cutting
from .values import refuse_auto, to_boolean, to_integer, to_number, to_tuple, to_word

Bits = Literal[3, 4, 8, 32]
Quantize = Literal["eigenbasis", "preconditioner"]
CodeBook = Literal["linear2", "dynamic_tree", "normal"]
RefreshDtype = Literal["float64", "float32"]
Refresh = Literal["together", "staggered"]
RefreshIterations = Literal[1, 2]
Root = Literal["stored", "rectified", "implicit"]
ScaleDtype = Literal["float32", "bfloat16"]
LowDtype = Literal["float32", "bfloat16"]
MatmulDtype = Literal["float32", "tf32", "bfloat16"]
Split = Literal["aligned", "even", "remainder"]
GraftingScope = Literal["parameter", "block", "none"]
Method = Literal["shampoo", "soap"]
MomentDtype = Literal["float32", "bfloat16", "int8"]
SecondMomentDtype = Literal["float32", "bfloat16", "int8", "factored"]
Preset = Literal["paper", "compact", "shampoo-compact"]


def _option(default: Any, help: str, lowest: int | None = None) -> Any:
    """A field of the options; ``lowest`` is the least value of an integer. Help has no bare percent signs."""
    return field(default=default, metadata={"help": help, "lowest": lowest})


@dataclass(frozen=True)
class PreconditionerOptions:
    """Everything that a parameter group may say of its preconditioner; each field's metadata has its ``help``.

    Values may also stand as configuration files write them, such as ``"100"`` or ``100.0`` for 100.

    Raises:
        ValueError: a value that makes no sense, by itself or beside the others.
    """

    precondition: bool = _option(True, "Precondition the parameters; False leaves them to the base optimizer alone.")
    method: Method = _option(
        "soap",
        'The update rule. "soap" is Adam in the coordinates of the eigenbases; the base optimizer keeps nothing of a '
        'preconditioned parameter. "shampoo" multiplies gradients by inverse roots, as the paper of 4-bit Shampoo '
        "does, and the base optimizer takes the result for a gradient.",
    )
    bits: Bits = _option(
        8,
        'Bits per element of the eigenbases: 3, 4 or 8; 32 stores them in float32, and with method="shampoo" the '
        "statistics L and R themselves. With 3 or 4 bits rectify_steps is (1, 1) and protect is True, unless given.",
    )
    quantize: Quantize = _option(
        "eigenbasis",
        'What is quantized: the eigenbases of L and R, or with "preconditioner" L and R, the paper\'s naive baseline.',
    )
    codebook: CodeBook = _option(
        "linear2",
        'Levels that values are rounded to, zero among them; "normal" has the best levels for Gaussian values, with '
        "scales of least squared error.",
    )
    quant_block_size: int = _option(64, "Elements that share one scale.", lowest=1)
    scale_dtype: ScaleDtype = _option("bfloat16", "Type of the stored scales.")
    root: Root = _option(
        "stored",
        "Inverse roots are stored. In a step that also renews the eigenbasis they are computed before it is quantized; "
        'with "rectified" always from the stored eigenbasis, as in the paper. "implicit" stores none: every step '
        "computes directions from the rectified eigenbases.",
    )
    protect: bool = _option(
        False,
        "Keep one in sixteen eigenvectors, those of the largest eigenvalues, in 8 bits, and the others, in 3 or 4 "
        "bits, orthogonal to them.",
    )
    min_quant_numel: int = _option(
        4096, "Least elements of a factor that is quantized; smaller ones stay in float32.", 0
    )
    shampoo_beta: float = _option(0.9, "Decay of the statistics' running average, in [0, 1), per statistics update.")
    matrix_eps: float = _option(
        1e-6, "Initial statistics, and ridge of the inverse roots relative to the largest eigenvalue."
    )
    statistics_interval: int = _option(
        5, "Steps between statistics updates (T1), which also renew the eigenbases.", lowest=1
    )
    root_interval: int = _option(500, 'With method="shampoo": steps between inverse roots (T2).', lowest=1)
    interval_warmup: bool = _option(
        True,
        "Begin with short intervals that double until they are as long as asked for: statistics in step 5, inverse "
        "roots in steps 10, 20, 40 and so on. False keeps the intervals from the first step, as in the paper: the base "
        "optimizer then works alone until step root_interval.",
    )
    refresh: Refresh = _option(
        "together",
        'Refresh all factors in the same steps, as in the paper, or "staggered": each in its own steps, at the same '
        "intervals, so that all steps take about as long.",
    )
    rectify_steps: tuple[int, int] = _option(
        (0, 0), "Steps of Björck's iteration on a dequantized eigenbasis, before a statistics update and before a root."
    )
    refresh_iterations: RefreshIterations = _option(1, "QR steps of a statistics update.")
    refresh_dtype: RefreshDtype = _option("float32", "Arithmetic of statistics updates and inverse roots.")
    max_preconditioner_dim: int = _option(256, "Most rows or columns of a block.", lowest=1)
    max_aspect: int = _option(
        7,
        "A side of a matrix more than this many times as long as the other has no factors: the matrix is "
        "preconditioned on the other side only. Four times as many in matrices of fewer than 4096 elements. 0 gives "
        "every side factors.",
        lowest=0,
    )
    split: Split = _option(
        "aligned",
        "Cut a long side into parts of about equal size, in multiples of 64 where there is room; with "
        '"even" of sizes that differ by at most 1; with "remainder" into full parts and a rest.',
    )
    batch_dims: int = _option(
        -1,
        "Leading dimensions that count matrices, each of which has its own factors: 1 for experts of shape "
        "[experts, rows, columns]. -1 finds stacks by their shape, and leaves stacked biases to the base "
        "optimizer.",
        lowest=-1,
    )
    split_rows: tuple[int, ...] = _option(
        (),
        "Cut the rows of a matrix, such as a fused projection, into parts with their own factors: one number is how "
        "many equal parts, several are their sizes.",
    )
    grafting: GraftingScope = _option(
        "parameter",
        "Whose gradient norm a direction takes: the matrix's, the block's, or none.",
    )
    soap_betas: tuple[float, float] = _option(
        (0.9, 0.95),
        'With method="soap": decay of momentum and second moment, each in [0, 1), per step.',
    )
    soap_eps: float = _option(1e-8, 'With method="soap": what is added to the root of the second moment.')
    newton_schulz_steps: int = _option(
        0,
        "With method=\"soap\": steps of Muon's iteration that bring a direction's singular values close to 1; 5 are "
        "usual.",
        lowest=0,
    )
    momentum_dtype: MomentDtype = _option(
        "bfloat16", 'With method="soap": how the momentum is stored; "int8" is 8 bits with a scale for each block.'
    )
    second_moment_dtype: SecondMomentDtype = _option(
        "bfloat16",
        'With method="soap": how the second moment is stored; "factored" keeps the means of its rows and columns.',
    )
    max_failures: int = _option(
        10,
        "Failed updates of a factor in a row before step() raises. A failed update, one with numbers that are not "
        "finite, leaves the factor as it was.",
        lowest=1,
    )
    matmul_dtype: MatmulDtype = _option(
        "float32",
        'Type of the matrix products that make a direction; stored states do not depend on it. "tf32" is float32 with '
        "products in TF32, for CUDA devices that have it.",
    )
    exchange_dtype: LowDtype = _option(
        "float32",
        'Type in which gradients and directions travel between ranks. "bfloat16" halves the traffic, and rounds also '
        "what need not travel, so that training is the same on any number of ranks.",
    )
    scratch_mib: int = _option(
        0,
        "Memory in MiB that a step may take for dequantized matrices and messages; a single block may need more. 0 "
        "stands for 256 on a CPU and 2048 on an accelerator, which needs larger batches.",
        lowest=0,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _convert(option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
            _check(option.name, value)
        for name in UNUSED_BY[self.method]:
            if getattr(self, name) != DEFAULTS[name]:
                other = "soap" if self.method == "shampoo" else "shampoo"
                raise ValueError(f"{name}={getattr(self, name)!r} is for method={other!r}, got method={self.method!r}")
        if self.method == "soap":
            for index, name in enumerate(("momentum_dtype", "second_moment_dtype")):
                kind = getattr(self, name)
                if 1 - self.soap_betas[index] < SMALLEST_CHANGE.get(kind, 0.0):
                    raise ValueError(
                        f"soap_betas={self.soap_betas} changes a moment by less in a step than {name}={kind!r} can "
                        f"hold, so it would stand still: use at most {1 - SMALLEST_CHANGE[kind]:.3g} for "
                        f"soap_betas[{index}], or {name}='float32'"
                    )
        if self.codebook == "normal" and self.quant_block_size < 2:
            raise ValueError("codebook='normal' needs a quant_block_size of at least 2: a block of 1 is its own scale")
        if self.protect and (self.bits > 4 or self.quantize != "eigenbasis"):
            raise ValueError(
                f"protect=True is for eigenbases in 3 or 4 bits, got bits={self.bits}, quantize={self.quantize!r}"
            )
        if self.root == "implicit" and self.bits == 32:
            raise ValueError("root='implicit' is about low precision: bits=32 keeps its roots as they are")
        if self.root == "implicit" and self.quantize != "eigenbasis":
            raise ValueError(f"root='implicit' needs quantize='eigenbasis', got {self.quantize!r}")

    @classmethod
    def of_call(cls, given: Mapping[str, Any]) -> PreconditionerOptions:
        """Return the options among the arguments of a call, which may have ``total_steps``, too."""
        own = {name: given[name] for name in OPTION_NAMES if name in given}
        method = to_word(given.get("method", DEFAULTS["method"]))
        return cls(**own | chosen_intervals(method, given, given.get("total_steps")))

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> PreconditionerOptions:
        """Return the options in a parameter group; for those that an older version did not know, what it did."""
        given = (group.get(name, default) for name, default in {**DEFAULTS, **_BEFORE}.items())
        values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in given]  # which can be hashed
        try:
            return _cached(*values)
        except TypeError:  # a value that cannot be hashed cannot be right either: let the checks say so
            return cls(*values)

    def as_group(self) -> dict[str, Any]:
        """Return these options as plain values, to stand in a parameter group."""
        return asdict(self)

    def shaping_bytes(self) -> dict[str, Any]:
        """Return the options that decide the layout of stored bytes: equal ones can read each other's states."""
        if not self.precondition:
            return {"precondition": False}
        names = ["precondition", "method", "bits", *CUTTING]
        if self.method == "soap":
            names += ["momentum_dtype", "second_moment_dtype"]
        if self.bits != 32:
            names += ["quantize", "codebook", "quant_block_size", "scale_dtype", "root", "protect", "min_quant_numel"]
        elif "int8" in (self.momentum_dtype, self.second_moment_dtype):
            names += ["quant_block_size", "scale_dtype"]
        found = {name: getattr(self, name) for name in names}
        if found.get("root") == "rectified":
            found["root"] = "stored"  # in the same bytes
        return found

    @property
    def cutting(self) -> Cutting:
        """How matrices are cut into blocks."""
        return Cutting(self.max_preconditioner_dim, self.split, self.max_aspect)

    def scratch_on(self, device: torch.device | str) -> int:
        """Return the MiB that a step may take on a device, or on devices of a type."""
        return self.scratch_mib or (256 if torch.device(device).type == "cpu" else 2048)

    def is_quantized(self, order: int) -> bool:
        """Return whether a factor of this order is kept in low precision: its order alone decides, never a shard."""
        return self.bits != 32 and order * order >= self.min_quant_numel


TYPES: dict[str, Any] = get_type_hints(PreconditionerOptions)
DEFAULTS: dict[str, Any] = {option.name: option.default for option in fields(PreconditionerOptions)}
HELP: dict[str, str] = {option.name: option.metadata["help"] for option in fields(PreconditionerOptions)}
OPTION_NAMES = tuple(DEFAULTS)
CUTTING = ("max_preconditioner_dim", "split", "max_aspect", "batch_dims", "split_rows")  # what decides on blocks
# Options that a method does not use.
UNUSED_BY: dict[str, tuple[str, ...]] = {
    "shampoo": (
        "soap_betas",
        "soap_eps",
        "newton_schulz_steps",
        "momentum_dtype",
        "second_moment_dtype",
    ),
    "soap": ("quantize", "root", "root_interval", "grafting"),
}
# By the type of a moment, the least share of it that a step must change: less would be rounded away.
SMALLEST_CHANGE = {"bfloat16": 2**-8, "int8": 0.01}
_LOWEST: dict[str, int | None] = {option.name: option.metadata["lowest"] for option in fields(PreconditionerOptions)}
_DROPPED = ", which is no longer there, nor are its states read: use 'implicit', which stores less with less error"
_BEFORE: dict[str, Any] = {
    "interval_warmup": False,
    "method": "shampoo",
}  # what versions did that did not know the option
_CONVERTERS: dict[type, Any] = {bool: to_boolean, int: to_integer, float: to_number, str: to_word, tuple: to_tuple}
_cached = functools.lru_cache(maxsize=256, typed=True)(PreconditionerOptions)


def _convert(name: str, value: Any) -> Any:
    """What a value means; one that can mean nothing stays as it was, for :func:`_check` to refuse."""
    refuse_auto(name, value, DEFAULTS[name])
    value = _CONVERTERS[type(DEFAULTS[name])](value)
    if name == "split_rows" and not isinstance(value, tuple):
        value = (to_integer(value),)
    convert = to_number if name == "soap_betas" else to_integer
    return tuple(map(convert, value)) if isinstance(value, tuple) else value


def _check(name: str, value: Any) -> None:
    """Raise ValueError unless the option's value has its type and is in its range."""
    lowest = _LOWEST[name]
    if get_origin(TYPES[name]) is Literal:
        choose(name, value, get_args(TYPES[name]))
    elif TYPES[name] is bool and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    elif lowest is not None:
        check_integer(name, value, lowest)
    elif name == "shampoo_beta" and not _is_decay(value):
        raise ValueError(f"shampoo_beta must be in [0, 1), got {value!r}")
    elif name in ("matrix_eps", "soap_eps") and not (_is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    elif name == "soap_betas":
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_decay, value))):
            raise ValueError(f"soap_betas must be two numbers in [0, 1), got {value!r}")
    elif name == "split_rows":
        for count in value:
            check_integer(name, count, 1)
    elif name == "rectify_steps":
        if not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise ValueError(f"rectify_steps must be two integers, for a statistics and a root step, got {value!r}")
        for count in value:
            check_integer(name, count, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value < 1.0


def choose(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the ``choices``."""
    if isinstance(value, bool) or value not in choices:
        hint = _DROPPED if (name, value) == ("root", "triangle") else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_integer(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``lowest``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


def chosen_intervals(method: Any, given: Mapping[str, Any], total_steps: Any = None) -> dict[str, Any]:
    """Return the intervals that are ``given``, or a method's defaults where they are missing or None.

    With method="shampoo" a run of ``total_steps`` has about a hundred roots, but at most one in 50 steps; without that,
    inverse roots are 500 steps apart. Statistics are a fifth of that apart, or as far as roots that are nearer than 100
    steps.

    Raises:
        ValueError: ``total_steps`` is neither None nor a positive integer.
    """
    if total_steps is not None:
        total_steps = to_integer(total_steps)
        check_integer("total_steps", total_steps, 1)
    defaults = {name: DEFAULTS[name] for name in ("statistics_interval", "root_interval")}
    own = {name: given[name] for name in defaults if given.get(name) is not None}
    if method != "shampoo":
        return defaults | own
    longest = defaults["root_interval"]
    suited = longest if total_steps is None else min(longest, max(50, total_steps // 100))
    root = to_integer(own.get("root_interval", suited))
    nearest = min(suited // 5, root) if isinstance(root, int) and "root_interval" in own else suited // 5
    return {"statistics_interval": nearest, "root_interval": suited} | own


# Defaults of a method that are not those of the signature.
METHODS: dict[str, dict[str, Any]] = {
    "shampoo": {
        "bits": 4,
        "scale_dtype": "float32",
        "shampoo_beta": 0.95,
        "rectify_steps": (1, 2),
        "max_preconditioner_dim": 1024,
    },
    "soap": {},
}
_BEFORE |= {**METHODS["shampoo"], "rectify_steps": (1, 4), "refresh_dtype": "float64"}
FORMER_CUTTING = {"split": "even", "max_aspect": 0, "batch_dims": 0, "split_rows": ()}  # of what knew no such options
_BEFORE |= FORMER_CUTTING
