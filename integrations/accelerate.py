"""Accelerate: save states that go on under any host.

::

    accelerator = PortableAccelerator()  # save_state() here, load_state() on other hosts and numbers of processes

States that a plain ``Accelerator`` saves belong to the host that wrote them, and FSDP1's are refused; a program that
keeps it calls ``consolidate_before_saving()`` once. :mod:`.rehearsal` has what launch scripts need besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DeepSpeedSchedulerWrapper,
    DistributedType,
    broadcast_object_list,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.hosts import reshard
from sharded_shampoo4.report import warn

from .fsdp import bind

_COUNTS = "shampoo4_counts.json"  # beside what Accelerate writes: what its counters count


class PortableAccelerator(Accelerator):  # type: ignore[misc]
    """An ``Accelerator`` whose saved states go on under any host and on any number of processes.

    Weights and the states of Shampoo4 are in ``shampoo4``, in the form of :mod:`sharded_shampoo4.checkpoint` (those of
    a second Shampoo4 in ``shampoo4_1``, and so on); schedulers, samplers, random numbers, scaler and what was
    registered for checkpointing lie beside it as Accelerate saves them. FSDP's state dict types make no difference. On
    another number of processes some of them begin with random numbers of their own.

    Accelerate steps a prepared scheduler as many times as there are processes. On another number of them its counts are
    converted, so that it goes on at the same optimizer step: the number of images of a step should stay the same. This
    is known of LambdaLR, which all schedulers of transformers' ``get_scheduler()`` are. With another number of
    processes or other ``gradient_accumulation_steps`` a new accumulation begins.

    A Shampoo4 belongs to the prepared models that have its parameters, and takes names from them that are missing.
    Under FSDP1 it is bound to its model. Other models, such as a frozen teacher, and other optimizers are saved as
    Accelerate saves them: they go on under the same host. Hooks for saving and loading get all models. The list of
    weights that they get leaves out the models of a Shampoo4.

    Args:
        *args: of ``Accelerator``.
        frozen: False leaves frozen parameters out of saved states (the base model under adapters, for example).
        **kwargs: of ``Accelerator``.
    """

    _models: list[Any]
    _optimizers: list[Any]
    _save_model_state_pre_hook: dict[int, Callable[..., None]]
    _load_model_state_pre_hook: dict[int, Callable[..., None]]

    def __init__(self, *args: Any, frozen: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._frozen = frozen

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as in ``Accelerator``; a Shampoo4 is bound to the FSDP1 model that it is prepared with.

        Raises:
            ValueError: what ``fsdp.bind`` says of the model; or ``save_state()`` could not save what is prepared: a
                Shampoo4 whose parameters are in no prepared model, or have no names of their own; or DeepSpeed's
                configuration has another optimizer take its place (:func:`keep_offloaded`).
        """
        if any(unwrapped(arg) is not None for arg in args):
            keep_offloaded(getattr(self.state, "deepspeed_plugin", None))
        prepared = super().prepare(*args, **kwargs)
        together = prepared if isinstance(prepared, tuple) else (prepared,)
        if self.distributed_type == DistributedType.DEEPSPEED:
            return prepared
        sharded = [model for model in together if isinstance(model, FullyShardedDataParallel)]
        for handle in together:
            optimizer = getattr(handle, "optimizer", None)
            if isinstance(optimizer, Shampoo4):
                optimizer._saving_is_arranged = True
                if sharded:
                    bind(optimizer, _as_one(_models_of(optimizer, sharded) or sharded[:1]))
        if self._models:
            self._portable_pairs()
        return prepared

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> str:
        """Save as in ``Accelerator``; every process must call it.

        A state that is in the folder already stops counting at once; the new one counts when it is complete.

        Raises:
            OSError, ValueError: on every process alike.
        """
        pairs = self._portable_pairs()
        if not pairs:
            return str(super().save_state(output_dir, *args, **kwargs))
        if output_dir is not None and not self.project_configuration.automatic_checkpoint_naming:
            output_dir = os.path.expanduser(output_dir)
            on_main_process(_make_incomplete, Path(output_dir))
        with self._without(pairs):
            folder = Path(super().save_state(output_dir, *args, **kwargs))
        on_main_process((folder / _COUNTS).write_text, json.dumps(self._counts()))
        for pair in pairs:
            checkpoint.save(pair.optimizer, folder / pair.folder, model=pair.model, frozen=self._frozen)
        return str(folder)

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Load as in ``Accelerator``; every process must call it.

        Without a folder, but with automatic naming, the newest complete state is loaded.

        Raises:
            FileNotFoundError, ValueError: on every process alike: there is no such checkpoint, or it does not fit.
        """
        pairs = self._portable_pairs()
        if not pairs:
            super().load_state(input_dir, *args, **kwargs)
            return
        if input_dir is None and not self.project_configuration.automatic_checkpoint_naming:
            raise ValueError("load_state() needs the folder, unless the project has automatic_checkpoint_naming")
        if input_dir is None:
            input_dir = str(on_main_process(_newest, Path(self.project_dir) / "checkpoints", pairs))
        folder = Path(input_dir).expanduser()
        saved = on_main_process(_read_counts, folder) or self._counts()
        before, now = (1 if c.get("split_batches") else c["num_processes"] for c in (saved, self._counts()))
        schedulers = self._schedulers_to_convert() if before != now else []
        for pair in pairs:
            checkpoint.load(pair.optimizer, folder / pair.folder, model=pair.model, frozen=self._frozen)
        with self._without(pairs):
            super().load_state(input_dir, *args, **kwargs)
        if saved != self._counts():
            self.step = 0
        for scheduler in schedulers:
            _convert(scheduler, before, now)

    def _counts(self) -> dict[str, int]:
        """What Accelerate's counters of batches and of schedules depend on."""
        return {
            "num_processes": self.num_processes,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "split_batches": self.split_batches,
        }

    def _schedulers_to_convert(self) -> list[LambdaLR]:
        """The prepared schedulers that Accelerate steps with the optimizer.

        Raises:
            ValueError: one of them is of a kind whose counts cannot be converted.
        """
        found = []
        for prepared in self._schedulers:
            if isinstance(prepared, DeepSpeedSchedulerWrapper) or not prepared.step_with_optimizer:
                continue
            if not isinstance(prepared.scheduler, LambdaLR):
                raise ValueError(
                    f"a prepared {type(prepared.scheduler).__name__} cannot go on with num_processes = "
                    f"{self.num_processes}, other than at the save: Accelerate steps it once for each process. Do not "
                    "give the scheduler to prepare(), step it once per optimizer step, and register_for_checkpointing()"
                )
            found.append(prepared.scheduler)
        return found

    def _portable_pairs(self) -> list[_Pair]:
        """Every Shampoo4 with the models that have its parameters.

        Under FSDP2 a model that was evaluated last has whole weights in place of these parameters: they are given up.

        Raises:
            ValueError: there are none, or portable checkpoints cannot tell the parameters by name.
            RuntimeError: inside ``FSDP.summon_full_params()``.
        """
        if self.distributed_type == DistributedType.DEEPSPEED:
            engines = [model for model in self._models if isinstance(getattr(model, "basic_optimizer", None), Shampoo4)]
            return [_Pair(_folder(index), engine, engine, [engine]) for index, engine in enumerate(engines)]
        for model in self._models:
            reshard(model)
        pairs: list[_Pair] = []
        for handle in self._optimizers:
            optimizer = getattr(handle, "optimizer", None)
            if not isinstance(optimizer, Shampoo4):
                continue
            models = _models_of(optimizer, self._models)
            if not models:
                raise ValueError(
                    f"the parameters of a Shampoo4 are in none of the {len(self._models)} prepared models: give the "
                    "model and the optimizer to prepare() together, the optimizer made of that model's parameters"
                )
            model = _as_one(models)
            optimizer._take_names(model, anew=len(models) > 1)
            pairs.append(_Pair(_folder(len(pairs)), model, handle, models))
        left = len(self._optimizers) - len(pairs)
        models_left = len(self._models) - len({id(model) for pair in pairs for model in pair.models})
        if pairs and left > models_left and self.distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"{left} optimizers are no Shampoo4, and only {models_left} models are not trained by one: under FSDP "
                "Accelerate saves every optimizer with a model of its own"
            )
        return pairs

    @contextlib.contextmanager
    def _without(self, pairs: list[_Pair]) -> Iterator[None]:
        """Have Accelerate see only models and optimizers that are in none of ``pairs``; hooks see them all."""
        apart = {id(held) for pair in pairs for held in (*pair.models, pair.optimizer)}
        models, optimizers = self._models, self._optimizers
        before_saving, before_loading = self._save_model_state_pre_hook, self._load_model_state_pre_hook

        @contextlib.contextmanager
        def seeing_all() -> Iterator[list[Any]]:
            seen = self._models, self._optimizers
            self._models, self._optimizers = models, optimizers
            try:
                yield list(models)
            finally:
                self._models, self._optimizers = seen

        def saving(hook: Callable[..., None]) -> Callable[..., None]:
            def call(_: list[Any], weights: list[Any], folder: str) -> None:
                with seeing_all() as everything:
                    hook(everything, weights, folder)

            return call

        def loading(hook: Callable[..., None]) -> Callable[..., None]:
            def call(given: list[Any], folder: str) -> None:
                with seeing_all() as everything:
                    hook(everything, folder)
                kept = set(map(id, everything))  # a hook takes out of the list what it has loaded itself
                given[:] = [model for model in given if id(model) in kept]

            return call

        self._models = [model for model in models if id(model) not in apart]
        self._optimizers = [optimizer for optimizer in optimizers if id(optimizer) not in apart]
        self._save_model_state_pre_hook = {key: saving(hook) for key, hook in before_saving.items()}
        self._load_model_state_pre_hook = {key: loading(hook) for key, hook in before_loading.items()}
        try:
            yield
        finally:
            self._models, self._optimizers = models, optimizers
            self._save_model_state_pre_hook, self._load_model_state_pre_hook = before_saving, before_loading


class _Pair(NamedTuple):
    """What is saved in one folder."""

    folder: str
    model: nn.Module
    optimizer: Any  # as checkpoint.save takes it
    models: list[nn.Module]  # that are in ``model``


def _folder(number: int) -> str:
    return f"shampoo4_{number}" if number else "shampoo4"


def numbered(folder: Path, prefix: str) -> list[Path]:
    """Return the folders in ``folder`` whose names are ``prefix`` and a number, the highest number first."""
    name = re.compile(rf"{re.escape(prefix)}(\d+)")
    matches = [(name.fullmatch(path.name), path) for path in folder.glob("*") if path.is_dir()]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)]


def _newest(checkpoints: Path, pairs: list[_Pair]) -> Path:
    """The folder with the highest number in which all optimizers have complete checkpoints."""
    for folder in numbered(checkpoints, "checkpoint_"):
        if all((folder / pair.folder / checkpoint.MANIFEST).is_file() for pair in pairs):
            return folder
    raise FileNotFoundError(f"{checkpoints} has no complete checkpoint")


def _make_incomplete(folder: Path) -> None:
    """Take away what makes a state that was saved in ``folder`` count."""
    for manifest in folder.glob(f"shampoo4*/{checkpoint.MANIFEST}"):
        manifest.unlink()


def _read_counts(folder: Path) -> dict[str, int] | None:
    """What :meth:`PortableAccelerator._counts` was at the save; None if it was not saved."""
    file = folder / _COUNTS
    if not file.exists():
        return None
    found: dict[str, int] = json.loads(file.read_text())
    return found


def _convert(scheduler: LambdaLR, before: int, now: int) -> None:
    """Have a scheduler that was stepped ``before`` times in an optimizer step go on with ``now`` times.

    The learning rates of this optimizer step were loaded.
    """
    old = scheduler.last_epoch
    scheduler.last_epoch = round(old * now / before)
    warn(
        f"Accelerate made {before} steps of a prepared scheduler in an optimizer step at the save, and makes {now} "
        f"here: it goes on at the same optimizer step, last_epoch = {scheduler.last_epoch} instead of {old}"
    )


def _models_of(optimizer: Shampoo4, models: list[Any]) -> list[nn.Module]:
    """Those of ``models`` that have parameters of ``optimizer``."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [model for model in models if any(id(parameter) in held for parameter in model.parameters())]


def _as_one(models: list[Any]) -> nn.Module:
    """One model, or several in a list, whose names begin with their places in it."""
    one: nn.Module = models[0] if len(models) == 1 else nn.ModuleList(models)
    return one


def unwrapped(optimizer: Any) -> Shampoo4 | None:
    """Return the Shampoo4 in the wrappers of Accelerate and DeepSpeed, if there is one."""
    while optimizer is not None and not isinstance(optimizer, Shampoo4):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def on_main_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return what ``function`` returns on the main process, on every process. Collective.

    Raises:
        OSError, ValueError: what it raises there, on every process.
    """
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [function(*args)]
        except (OSError, ValueError) as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def keep_offloaded(plugin: Any) -> None:
    """Have Accelerate and the Trainer leave a Shampoo4 in its place where ZeRO offloads the optimizer.

    By default they give DeepSpeed its own Adam for the CPU instead, and say nothing.

    Args:
        plugin: Accelerate's ``DeepSpeedPlugin``; None without DeepSpeed, where there is nothing to do.

    Raises:
        ValueError: the configuration asks for that Adam.
    """
    if plugin is None:
        return
    config = plugin.deepspeed_config
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    forced = config.setdefault("zero_force_ds_cpu_optimizer", False)  # without it the answer would be yes
    if forced and device != "none":
        raise ValueError(
            '"zero_force_ds_cpu_optimizer": true in DeepSpeed\'s configuration would replace Shampoo4 by '
            f"DeepSpeedCPUAdam, as the optimizer is offloaded to {device!r}: leave it out"
        )


def consolidate(optimizer: Optimizer) -> None:
    """Collect an optimizer's state on the process that saves it, if this host needs that. Collective.

    Needed where states are spread over the processes and the host takes them for copies of each other: DDP. FSDP and
    DeepSpeed save every process's part by themselves. Optimizers without ``consolidate_state_dict`` are left alone.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # prepare() wraps it
    if hasattr(inner, "consolidate_state_dict") and PartialState().distributed_type not in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    ):
        inner.consolidate_state_dict()


def consolidate_before_saving(accelerator: Accelerator, optimizer: Optimizer) -> RemovableHandle:
    """Have every ``accelerator.save_state()`` call :func:`consolidate` first, on all processes."""

    def hook(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        consolidate(optimizer)

    if (inner := unwrapped(optimizer)) is not None:
        inner._saving_is_arranged = True
    handle: RemovableHandle = accelerator.register_save_state_pre_hook(hook)
    return handle
