"""Run by ``torchrun`` in test_saving_advice.py: two steps under DDP in every way that can save, or cannot.

Every rank writes FOLDER/RANK.json: by way, the warnings of saving, and the error of ``save_state()`` if there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.accelerate import PortableAccelerator, consolidate_before_saving
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu
from sharded_shampoo4.integrations.transformers import ConsolidateStates, PortableTrainer, shampoo4

TRAINERS = (
    *("Trainer", "Trainer with an optimizer", "PortableTrainer"),
    *("ConsolidateStates", "save_strategy no", "save_only_model"),
)
ACCELERATORS = ("Accelerator", "PortableAccelerator", "consolidate_before_saving", "Accelerator under FSDP2")
WARNS = ("Trainer", "Trainer with an optimizer", "Accelerator")
SILENT = tuple(way for way in (*TRAINERS, *ACCELERATORS, "hand loop", "Lightning") if way not in WARNS)


class Net(nn.Module):
    """Two layers; returns the loss, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Stop(Exception):
    """Ends a Trainer's run."""


class StopAtTwo(TrainerCallback):
    """Ends the run before its first checkpoint, in which one rank would fail and the others wait for it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise Stop


def by_trainer(way: str, folder: str) -> None:
    """Two steps of a Trainer."""
    args = TrainingArguments(
        folder,
        max_steps=40,
        save_steps=20,
        save_strategy="no" if way == "save_strategy no" else "steps",
        save_only_model=way == "save_only_model",
        per_device_train_batch_size=4,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        accelerator_config={"use_configured_state": True},
    )
    model = Net()
    if way == "Trainer with an optimizer":
        optimizer: dict[str, Any] = {"optimizers": (Shampoo4(model.named_parameters()), None)}
    else:
        optimizer = {"optimizer_cls_and_kwargs": shampoo4(args)}
    data = [{"x": torch.randn(8), "labels": n % 4} for n in range(64)]
    kind = PortableTrainer if way == "PortableTrainer" else Trainer
    trainer = kind(model, args, train_dataset=data, callbacks=[StopAtTwo()], **optimizer)
    if way == "ConsolidateStates":
        trainer.add_callback(ConsolidateStates())
    try:
        trainer.train()
    except Stop:
        return
    raise AssertionError("the run was to end at step 2")


def by_accelerator(way: str, folder: str) -> str:
    """Two steps of a loop with an Accelerator, and ``save_state()``, whose error is returned."""
    accelerator = PortableAccelerator() if way == "PortableAccelerator" else Accelerator()
    model = Net()
    model, optimizer = accelerator.prepare(model, Shampoo4(model.named_parameters()))
    if way == "consolidate_before_saving":
        consolidate_before_saving(accelerator, optimizer)
    train(model, optimizer, accelerator.backward)
    try:
        accelerator.save_state(folder)
    except RuntimeError as error:
        return str(error)
    return ""


def by_hand() -> None:
    model = DistributedDataParallel(Net())
    train(model, Shampoo4(model.named_parameters()), Tensor.backward)


def by_lightning(folder: str) -> None:
    if importlib.util.find_spec("lightning") is None:
        return
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, *_: Any) -> Any:
            return self.net(torch.randn(4, 8), torch.arange(4))["loss"]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(8))

        def configure_optimizers(self) -> Any:
            return Shampoo4(self.named_parameters())

    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module())
    assert dist.get_world_size() == trainer.world_size == 2
    trainer.save_checkpoint(f"{folder}/lightning.ckpt")


def train(model: nn.Module, optimizer: Any, backward: Any) -> None:
    for _ in range(2):
        backward(model(torch.randn(4, 8), torch.arange(4))["loss"])
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    found = {}
    for way in (*WARNS, *SILENT):
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a process that has just started
        GradientState._reset_state()
        os.environ.update(ACCELERATE_USE_FSDP=str("FSDP2" in way).lower(), FSDP_VERSION="2")
        assert rehearse_on_cpu()
        torch.manual_seed(0)
        error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way in TRAINERS:
                by_trainer(way, str(folder / way))
            elif way in ACCELERATORS:
                error = by_accelerator(way, str(folder / way))
            elif way == "Lightning":
                by_lightning(str(folder))
            else:
                by_hand()
        found[way] = [[str(w.message) for w in caught if "will fail" in str(w.message)], error]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
