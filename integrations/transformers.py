"""The Trainer of transformers: an optimizer factory, and checkpoints that go on under any host and rank count.

::

    trainer = PortableTrainer(
        model,
        args,
        train_dataset=images,
        optimizer_cls_and_kwargs=shampoo4(args, preset="compact"),
    )
    trainer.train(resume_from_checkpoint=True)      # on as many processes as there are, under whatever host

A Trainer of one's own becomes such a one by ``class MyTrainer(PortableStates, Trainer)``. One that is not needs the
callback ``ConsolidateStates()``, and its checkpoints go on under the host and, with DeepSpeed, the number of processes
that wrote them.

``trainer.add_callback(LogOptimizer(trainer))`` adds the health of the optimizer, its bytes and its time to the logs.

``Trainer(optimizers=...)`` works as well, but not under FSDP. To rehearse FSDP2 on a machine without an accelerator,
set ``ACCELERATE_USE_FSDP=true``, call ``rehearse_on_cpu()`` before ``TrainingArguments(...)`` and give those
``accelerator_config={"use_configured_state": True}``: the Trainer falls back to DDP without a word otherwise.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.base_options import base_class
from sharded_shampoo4.names import plain_name
from sharded_shampoo4.options import DEFAULTS
from sharded_shampoo4.presets import apply_preset
from sharded_shampoo4.report import shorten, warn
from sharded_shampoo4.values import to_boolean, to_word

from .accelerate import consolidate, keep_offloaded, numbered, unwrapped
from .trainer_logs import LogOptimizer as LogOptimizer
from .views import grouped, matched, views_of

logger = logging.getLogger(__name__)

_REPLACED = ("_save_optimizer_and_scheduler", "_load_from_checkpoint", "_prepare_for_training", "_load_best_model")
# Options of Adam, and what a matrix has instead.
_OF_SOAP = {"adam_beta1": "soap_betas", "adam_beta2": "soap_betas", "adam_epsilon": "soap_eps"}
# Names that the Trainer does not decay, beside everything in a LayerNorm (Trainer.get_decay_parameter_names).
_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def shampoo4(args: TrainingArguments | None = None, **options: Any) -> tuple[type[Shampoo4Factory], dict[str, Any]]:
    """Make what ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train with ``Shampoo4``.

    Args:
        args: the Trainer's arguments. They are read when the Trainer makes the optimizer, so in each trial of a search.
            Learning rate, weight decay and, where the base optimizer has ``betas``, these and ``eps`` (``adam_beta1``,
            ``adam_beta2``, ``adam_epsilon``) are taken from them unless ``options`` give them; matrices have
            ``soap_betas`` and ``soap_eps`` instead, and a warning says so. ``total_steps`` is taken from ``max_steps``,
            if it is set; any option from ``optim_args``, such as
            ``"preset=compact, rectify_steps=(1, 2), exclude=[embed, lm_head]"``.
        **options: of :class:`Shampoo4`. They win over ``args``. ``weight_decay`` acts on the parameters that the
            Trainer itself would decay. ``split_fused=True`` gives the parts of fused projections factors of their own:
            see :func:`sharded_shampoo4.integrations.views.views_of`. ``exclude=`` leaves parameters to the base, as
            ``precondition=False`` does: a regular expression that is searched in their names (``"embed|lm_head"``), a
            type of module whose parameters they are (``nn.Embedding``), or a list of both.

    Raises:
        TypeError: neither ``args`` nor ``lr`` is given. The Trainer does not pass its learning rate on.
        ValueError: ``args.optim_args`` is not of the form above.
    """
    if args is not None:
        _with_args(options, args)  # for its errors
        options = {"args": args, **options}
    elif "lr" not in options:
        raise TypeError("shampoo4() needs TrainingArguments or lr: the Trainer does not pass its learning rate on")
    return Shampoo4Factory, options


def _with_args(options: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Add to ``options`` what the Trainer's arguments say, where ``options`` says nothing."""
    options = {**_optim_args(args.optim_args), **options}
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **_adam_options(args, options),
        **({"total_steps": args.max_steps} if args.max_steps > 0 else {}),
        **options,
    }


def _optim_args(text: str | None) -> dict[str, Any]:
    """The options in TrainingArguments' ``optim_args``; values may have commas in parentheses or brackets."""
    parts = [part.strip() for part in re.split(r",(?=\s*\w+\s*=)", text or "") if part.strip()]
    found = [part.partition("=") for part in parts]
    for name, equals, value in found:
        if not (name.strip().isidentifier() and equals and value.strip()):
            raise ValueError(f"optim_args must be options such as 'preset=compact, bits=8', got {text!r}")
    options: dict[str, Any] = {name.strip(): value.strip() for name, _, value in found}
    if "exclude" in options:
        options["exclude"] = _patterns(options["exclude"])
    return options


def _patterns(text: str) -> str | list[str]:
    """A list in brackets, quoted or not, as its parts; any other text, ``"[eE]mbed|head[0-9]"`` too, as it is."""
    depths = list(itertools.accumulate({"[": 1, "]": -1}.get(letter, 0) for letter in text))
    if not text.startswith("[") or depths.count(0) != 1 or depths[-1]:
        return text
    parts = re.split(r",(?![^\[{(]*[\]})])", text[1:-1])  # at commas outside of the brackets of a pattern
    return [part.strip().strip("'\"") for part in parts if part.strip()]


def _adam_options(args: TrainingArguments, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of Adam in ``args``, for a base optimizer that has them: one with ``betas``, and perhaps ``eps``."""
    known = inspect.signature(base_class(options.get("base", "adamw"))).parameters
    found = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {name: value for name, value in found.items() if name in known} if "betas" in known else {}


def _warn_of_adam(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Warn of options of Adam in ``args`` that do not reach matrices, since method="soap" has its own."""
    chosen = apply_preset(options)
    if to_word(chosen.get("method", DEFAULTS["method"])) != "soap" or to_boolean(chosen.get("precondition")) is False:
        return
    unused = {name: own for name, own in _OF_SOAP.items() if own not in chosen}
    changed = {name: own for name, own in unused.items() if getattr(args, name) != getattr(TrainingArguments, name)}
    if changed:
        warn(
            f"{', '.join(f'{name}={getattr(args, name)!r}' for name in changed)} of TrainingArguments do not reach "
            "matrices, which method='soap' trains: for these give "
            f"{' and '.join(dict.fromkeys(changed.values()))}, in optim_args or to shampoo4()"
        )


class Shampoo4Factory:
    """Builds the optimizer once the Trainer has its model; under FSDP1 that is the sharded one."""

    def __call__(self, model: nn.Module, *, args: TrainingArguments | None = None, **options: Any) -> Shampoo4:
        """Make ``Shampoo4`` over the parameters that require gradients, in a group with decay and one without.

        Raises:
            ValueError: a part of ``exclude`` matches no parameter, or all of it every matrix; ``split_fused`` is no
                boolean.
        """
        keep_offloaded(AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None)
        if args is not None:
            options = _with_args(options, args)
            _warn_of_adam(args, options)
        weight_decay = options.pop("weight_decay", 0.0)
        split_fused = to_boolean(options.pop("split_fused", False))
        if split_fused not in (True, False):
            raise ValueError(f"split_fused must be True or False, got {split_fused!r}")
        views = views_of(model) if split_fused else {}
        views |= {name: {"precondition": False} for name in _excluded(model, options.pop("exclude", ()))}
        decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))  # type: ignore[no-untyped-call]
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {**group, "weight_decay": weight_decay if decays else 0.0}
            for decays in (True, False)
            for group in grouped([(plain_name(n), p) for n, p in named if (n in decayed) is decays], views)
        ]
        optimizer = Shampoo4(groups, **options)
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            from .fsdp import bind

            bind(optimizer, model)
        return optimizer


def _excluded(model: nn.Module, exclude: str | type[nn.Module] | Iterable[str | type[nn.Module]]) -> set[str]:
    """Return the plain names of the parameters that ``exclude`` matches."""
    parts = (exclude,) if isinstance(exclude, (str, type)) else tuple(exclude)
    try:
        found = {name for wanted in parts for name in matched(model, wanted)}
    except ValueError as error:
        raise ValueError(f"exclude: {error}") from None
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [name for name, parameter in named if parameter.ndim > 1]
    if matrices and found.issuperset(matrices):
        shown = exclude if isinstance(exclude, (str, type)) else list(parts)
        raise ValueError(f"exclude={shown!r} leaves no matrix to precondition: {shorten(matrices)} are excluded")
    return found


class PortableStates:
    """For a Trainer's bases: what it saves in a checkpoint goes on under any host and on any number of processes.

    Weights and states are in the checkpoint's folder ``shampoo4``, in the form of :mod:`sharded_shampoo4.checkpoint`,
    instead of in the files of the host; scheduler, random numbers and the Trainer's own state lie beside it. Another
    optimizer is saved as any Trainer does, and a checkpoint without that folder is resumed so. The number of images of
    a step should stay the same.

    Args:
        *args: of ``Trainer``.
        frozen: False leaves frozen parameters out of checkpoints (the base model under adapters, for example).
        **kwargs: of ``Trainer``.
    """

    _FOLDER = "shampoo4"
    _SCHEDULER = "scheduler.pt"

    def __init__(self, *args: Any, frozen: bool = True, **kwargs: Any) -> None:
        self._frozen = frozen
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in _REPLACED if not hasattr(Trainer, name)]
        if missing:
            raise TypeError(f"this version of transformers has no Trainer.{missing[0]}(): PortableStates knows 5.x")

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as in ``Trainer``; True goes on with the newest complete checkpoint and warns of those passed over.

        Raises:
            ValueError: True, and there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_newest(Path(self.args.output_dir)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self._inner_optimizer() is None:  # nothing of ours
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        folder = Path(output_dir) / self._FOLDER
        checkpoint.save(self._portable_optimizer(), folder, model=self.model_wrapped, frozen=self._frozen)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / self._SCHEDULER)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._portable_in(resume_from_checkpoint):  # else the weights come with the states
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, resume_from_checkpoint: str | None) -> Any:
        portable = self._portable_in(resume_from_checkpoint)
        by_host = None if portable else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, loader, by_host)  # type: ignore[misc]
        inner = self._inner_optimizer()
        if inner is not None:
            inner.warn_if_short(max_steps)
            inner._saving_is_arranged = True
        if portable:
            self._portable_load(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
            _load_scheduler(self.lr_scheduler, Path(resume_from_checkpoint or "") / self._SCHEDULER)
        return prepared

    def _load_best_model(self: Any) -> None:
        best = self.state.best_model_checkpoint
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and self._portable_in(best):
            logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
            self._portable_load(best)
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _portable_optimizer(self: Any) -> Any:
        """What ``checkpoint.save`` takes: DeepSpeed's engine, or the optimizer."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.optimizer

    def _inner_optimizer(self: Any) -> Shampoo4 | None:
        """The Shampoo4 that trains, in whatever wrappers."""
        return unwrapped(self.optimizer)

    def _portable_in(self, folder: str | None) -> bool:
        return folder is not None and (Path(folder) / self._FOLDER).is_dir()

    def _portable_load(self: Any, folder: str) -> None:
        with warnings.catch_warnings():  # the Trainer's checkpoint has the schedule, also where DeepSpeed runs it
            warnings.filterwarnings("ignore", message=".*DeepSpeed's scheduler")
            place = Path(folder) / self._FOLDER
            checkpoint.load(self._portable_optimizer(), place, model=self.model_wrapped, frozen=self._frozen)


class PortableTrainer(PortableStates, Trainer):  # type: ignore[misc]
    """A ``Trainer`` with :class:`PortableStates`."""


class ConsolidateStates(TrainerCallback):
    """Calls the optimizer's ``consolidate_state_dict()`` on every process before the Trainer saves a checkpoint.

    Under DDP the Trainer asks the main process alone for the optimizer's state. A callback that requests checkpoints by
    itself must stand before this one.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the optimizer that its state will be whole."""
        if (inner := unwrapped(kwargs["optimizer"])) is not None:
            inner._saving_is_arranged = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Consolidate before a checkpoint at this step."""
        _consolidate_if(control.should_save, kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Consolidate before a checkpoint after this epoch."""
        _consolidate_if(control.should_save, kwargs["optimizer"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Consolidate before a checkpoint that the Trainer may decide on by this evaluation."""
        if kwargs["optimizer"] is not None:  # None: evaluated without training
            _consolidate_if(args.save_strategy == SaveStrategy.BEST, kwargs["optimizer"])


def _consolidate_if(due: bool, optimizer: Optimizer) -> None:
    if due:
        consolidate(optimizer)


def _newest(folder: Path) -> Path:
    """The checkpoint with the most steps; those that were cut off lack the Trainer's state, which it writes last."""
    for path in numbered(folder, f"{PREFIX_CHECKPOINT_DIR}-"):
        if (path / TRAINER_STATE_NAME).exists():
            return path
        logger.warning(f"{path} was never finished (no {TRAINER_STATE_NAME}) and is passed over")
    raise ValueError(f"{folder} has no complete checkpoint to resume from")


def _load_scheduler(scheduler: Any, file: Path) -> None:
    """Restore a scheduler that may have had another number of groups: DeepSpeed's configuration makes only one."""
    state, own = torch.load(file, weights_only=True), scheduler.state_dict()
    if state.keys() != own.keys():
        raise ValueError(f"{file} is of another kind of scheduler: it has {sorted(state)}, this one {sorted(own)}")
    for name, values in state.items():
        if isinstance(values, list) and len(values) != len(own[name]):
            if any(value != values[0] for value in values):
                raise ValueError(f"{file} has {name} = {values}, for other groups than the {len(own[name])} here")
            state[name] = values[:1] * len(own[name])
    scheduler.load_state_dict(state)
