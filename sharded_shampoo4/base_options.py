"""The base optimizer and its options, and the checks of a parameter group, in which both kinds of options stand."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .options import DEFAULTS, OPTION_NAMES, UNUSED_BY, PreconditionerOptions, chosen_intervals
from .presets import apply_preset
from .values import like, not_negative, to_number, to_word

if TYPE_CHECKING:
    from .base import Base

_BASES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}
_NOT_ELEMENTWISE = ("LBFGS", "Muon", "Adafactor", "SparseAdam")


def base_class(base: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the optimizer class that ``base`` names.

    Raises:
        TypeError: it is neither a name nor a torch optimizer class.
        ValueError: an unknown name, or a class whose rule is not elementwise.
    """
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
    """Return the keyword arguments for ``rule``: learning rate, weight decay and ``options``, converted.

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
                f"{rule.__name__}{_hint(name, [*OPTION_NAMES, *known, 'lr', 'weight_decay', 'preset'])}"
            )
    arguments = {"lr": lr, **options}
    if "weight_decay" in parameters or takes_any:
        arguments["weight_decay"] = weight_decay
    elif to_number(weight_decay) != 0.0:
        raise TypeError(f"weight_decay={weight_decay!r} was given, but {rule.__name__} has no weight_decay")
    arguments = {name: base_value(parameters, name, value) for name, value in arguments.items()}
    if arguments.get("differentiable"):
        raise ValueError("differentiable=True is not supported: gradients are preconditioned outside autograd")
    return arguments


def base_value(parameters: Mapping[str, inspect.Parameter], name: str, value: Any) -> Any:
    """Convert the value of a base optimizer's option.

    Args:
        parameters: of the base optimizer's constructor.
        name: of the option.
        value: as it was given.

    Raises:
        ValueError: a value of the wrong type.
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


def expand_preset(group: dict[str, Any], index: int, method: str) -> None:
    """Add the options of a parameter group's preset to the group, in place. Options that the group has stay.

    A group with another method than the call's ``method`` also gets the defaults of its method.
    """
    try:
        options = apply_preset(group, method)
    except ValueError as error:
        raise ValueError(f"param group {index}: {error}") from None
    group.pop("preset", None)
    chosen = to_word(options.get("method", method))
    if chosen != method:  # what is not given must not come from the call: it is of another method
        unused = {name: DEFAULTS[name] for name in (*UNUSED_BY.get(chosen, ()), "protect")}
        options = unused | options | chosen_intervals(chosen, options)
    group.update(options)


def check_group(group: dict[str, Any], index: int, given: Iterable[str], base: Base) -> None:
    """Check a parameter group's options and convert them, in place.

    An unknown key that looks like a misspelled option, or is another library's, raises TypeError. Others pass, as in
    torch: schedulers and training scripts keep notes of their own in groups.

    Args:
        group: with the values of all options.
        index: its number, for messages.
        given: the options that it was given itself.
        base: the base optimizer, which checks its own options.
    """
    own = [name for name in base.option_names if name in given]
    known = {*OPTION_NAMES, *base.option_names, "lr", "weight_decay", "preset", "params", "param_names"}
    for key in group.keys() - known:
        hint = _hint(key, known, cutoff=0.85)
        if hint:
            raise TypeError(f"unknown option {key!r} in param group {index}{hint}")
    try:
        options = PreconditionerOptions.of_group(group)
        group.update(options.as_group())
        group.update(base.converted({name: group[name] for name in own}))
        refuse_ignored(options, group)
    except (TypeError, ValueError) as error:
        raise ValueError(f"param group {index}: {error}") from None


NOT_OF_SOAP = ("maximize", "amsgrad")  # options of a base that soap's own steps do not have


def refuse_ignored(options: PreconditionerOptions, values: Mapping[str, Any]) -> None:
    """Raise ValueError if ``values`` of the base's options turn on what soap's own steps would do without."""
    if not options.precondition or options.method != "soap":
        return
    for name in NOT_OF_SOAP:
        if values.get(name):
            raise ValueError(
                f"{name}={values[name]!r} is an option of the base optimizer, which matrices with method='soap' do not "
                "take part in: leave it out, or give precondition=False"
            )


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
