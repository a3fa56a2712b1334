"""The Trainer of transformers: an optimizer factory, and states that are whole when the Trainer saves them.

    trainer = Trainer(
        model,
        args,
        train_dataset=images,
        optimizer_cls_and_kwargs=shampoo4(args, statistics_interval=10, root_interval=50),
        callbacks=[ConsolidateStates()],
    )

``Trainer(optimizers=...)`` works as well, but not under FSDP. To rehearse FSDP2 on a machine without an accelerator,
set ``ACCELERATE_USE_FSDP=true``, call ``rehearse_on_cpu()`` before ``TrainingArguments(...)`` and give those
``accelerator_config={"use_configured_state": True}``: the Trainer falls back to DDP without a word otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SaveStrategy

from sharded_shampoo4 import Shampoo4

from .accelerate import consolidate

# Names that the Trainer does not decay, beside everything in a LayerNorm (Trainer.get_decay_parameter_names).
_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def shampoo4(args: TrainingArguments | None = None, **options: Any) -> tuple[type[Shampoo4Factory], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train with ``Shampoo4``.

    Args:
        args: the Trainer's arguments. Learning rate and weight decay are taken from them unless ``options`` give them.
        **options: of :class:`Shampoo4`. ``weight_decay`` acts on the parameters that the Trainer itself would decay.

    Raises:
        TypeError: neither ``args`` nor ``lr`` is given. The Trainer does not pass its learning rate on.
    """
    if args is not None:
        options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options}
    if "lr" not in options:
        raise TypeError("shampoo4() needs TrainingArguments or lr: the Trainer does not pass its learning rate on")
    return Shampoo4Factory, options


class Shampoo4Factory:
    """Builds the optimizer once the Trainer has its model; under FSDP1 that is the sharded one."""

    def __call__(self, model: nn.Module, **options: Any) -> Shampoo4:
        """``Shampoo4`` over the parameters that require gradients, in a group with decay and one without."""
        weight_decay = options.pop("weight_decay", 0.0)
        decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))  # type: ignore[no-untyped-call]
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [(_plain(name), parameter) for name, parameter in named if (name in decayed) is decays],
                "weight_decay": weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        optimizer = Shampoo4([group for group in groups if group["params"]], **options)
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            from .fsdp import bind

            bind(optimizer, model)
        return optimizer


class ConsolidateStates(TrainerCallback):
    """Calls the optimizer's ``consolidate_state_dict()`` on every process before the Trainer saves a checkpoint.

    Under DDP the Trainer asks the main process alone for the optimizer's state. A callback that requests checkpoints by
    itself must stand before this one.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint at this step."""
        _consolidate_if(control.should_save, kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a checkpoint after this epoch."""
        _consolidate_if(control.should_save, kwargs["optimizer"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint that the Trainer may decide on by this evaluation."""
        if kwargs["optimizer"] is not None:  # None: evaluated without training
            _consolidate_if(args.save_strategy == SaveStrategy.BEST, kwargs["optimizer"])


def _consolidate_if(due: bool, optimizer: Optimizer) -> None:
    if due:
        consolidate(optimizer)


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
