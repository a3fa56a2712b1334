"""A Trainer on one process under ZeRO 2 with an offloaded optimizer; prints what DeepSpeed runs. Takes a folder."""

from __future__ import annotations

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sharded_shampoo4.integrations.deepspeed import skip_cpu_compilation
from sharded_shampoo4.integrations.transformers import shampoo4


class Model(nn.Module):
    """A matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": (self.layer(x) - labels).square().mean()}


def main() -> None:
    skip_cpu_compilation()
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": offload}
    args = TrainingArguments(
        sys.argv[1], max_steps=2, per_device_train_batch_size=4, deepspeed=config, use_cpu=True, report_to=[],
        save_strategy="no", learning_rate=2e-3,
    )  # fmt: skip
    data = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(8)]
    trainer = Trainer(Model(), args, train_dataset=data, optimizer_cls_and_kwargs=shampoo4(args))
    trainer.train()
    print("runs", type(trainer.model_wrapped.basic_optimizer).__name__)


if __name__ == "__main__":
    main()
