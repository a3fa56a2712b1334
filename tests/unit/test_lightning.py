"""Lightning: a module that returns the optimizer, a resumed run, and the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import needs
from support.spawned import run_spawned
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.options import DEFAULTS, METHODS
from sharded_shampoo4.presets import PRESETS

pytestmark = needs("lightning", "jsonargparse")
OPTIONS: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1, "preset": "compact", "statistics_interval": 2}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """That of a step, whatever Lightning makes of a loader that it goes on with."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step % 3)), torch.arange(8) % 6


def module_class() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 6))
            self.losses: list[float] = []

        def training_step(self, *_: Any) -> Any:
            inputs, labels = batch(self.global_step)
            loss = nn.functional.cross_entropy(self.net(inputs), labels)
            self.losses.append(loss.item())
            return loss

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(4))

    return Module


def fit(folder: Path, seed: int, **more: Any) -> tuple[Any, Any]:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Own(module_class()):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = Shampoo4(self.named_parameters(), **OPTIONS)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    torch.manual_seed(seed)
    module = Own()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=11, logger=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, **more)
    return module, trainer


def test_it_resumes_bitwise(tmp_path: Path) -> None:
    full, trainer = fit(tmp_path / "full", 0)
    assert isinstance(trainer.optimizers[0], Shampoo4) and trainer.optimizers[0].health()["net.0.weight"]["steps"] == 11
    assert len(full.losses) == 11
    resumed, again = fit(tmp_path / "resumed", 1, ckpt_path=str(tmp_path / "full" / "step=5.ckpt"))
    assert resumed.losses == full.losses[5:]
    for one, two in zip(full.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert again.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]


def by_command_line(*written: str) -> Shampoo4:
    from lightning.pytorch.cli import LightningCLI

    quiet = (
        "max_steps=2",
        "accelerator=cpu",
        "logger=false",
        "enable_progress_bar=false",
        "enable_checkpointing=false",
    )
    args = [*(f"--trainer.{option}" for option in quiet), "--optimizer", "sharded_shampoo4.Shampoo4", *written]
    cli = LightningCLI(module_class(), run=False, save_config_callback=None, args=args)
    cli.trainer.fit(cli.model)
    (optimizer,) = cli.trainer.optimizers
    return optimizer


def options_of(optimizer: Shampoo4) -> dict[str, Any]:
    return {name: optimizer.param_groups[0][name] for name in DEFAULTS}


def test_the_command_line_knows_presets() -> None:
    """LightningCLI passes every option to the constructor, with its default where the command line has none."""
    optimizer = by_command_line("--optimizer.lr", "1e-2", "--optimizer.preset", "compact")
    assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.health()["parameter 0 of group 0"]["steps"] == 2
    by_hand = Shampoo4([nn.Parameter(torch.zeros(4, 4))], lr=1e-2, preset="compact")
    assert options_of(optimizer) == options_of(by_hand)
    assert PRESETS["compact"].items() <= options_of(optimizer).items()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (("--optimizer.method", "shampoo"), {**METHODS["shampoo"], "method": "shampoo"}),
        (("--optimizer.preset", "compact", "--optimizer.bits", "3"), {**PRESETS["compact"], "bits": 3}),
        (("--optimizer.statistics_interval", "7", "--optimizer.split_rows", "[2]"),
         {"statistics_interval": 7, "split_rows": (2,), "bits": DEFAULTS["bits"]}),
        (("--optimizer.soap_betas", "[0.8, 0.9]", "--optimizer.base", "sgd"), {"soap_betas": (0.8, 0.9)}),
    ],
    ids=["method", "preset and option", "tuples", "base"],
)  # fmt: skip
def test_options_on_the_command_line(written: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert expected.items() <= options_of(by_command_line(*written)).items()


def train_in_parallel(strategy: str, folder: Path, seed: int, **more: Any) -> list[float]:
    """Losses of this rank, of two. The batches are the same on both."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Own(module_class()):  # type: ignore[misc]
        def configure_model(self) -> None:
            if strategy == "fsdp2" and not isinstance(self.net[0].weight, torch.distributed.tensor.DTensor):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            return Shampoo4(self.named_parameters(), **OPTIONS)

    torch.manual_seed(seed)
    module = Own()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy() if strategy == "fsdp2" else "ddp",
        max_steps=11, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, **more)
    return module.losses


def resumed_in_parallel(rank: int, strategy: str, folder: Path) -> dict[str, list[float]]:
    """As torchrun starts a rank, whose process group Lightning finds."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", GROUP_RANK="0", LOCAL_WORLD_SIZE="2")
    os.environ.update(TORCHELASTIC_RUN_ID="none", MASTER_ADDR="localhost", MASTER_PORT="0")
    full = train_in_parallel(strategy, folder / "full", 0)
    resumed = train_in_parallel(strategy, folder / "resumed", 1, ckpt_path=str(folder / "full" / "step=5.ckpt"))
    return {"full": full, "resumed": resumed}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_it_resumes_on_two_ranks(strategy: str, tmp_path: Path) -> None:
    for losses in run_spawned("gloo", 2, tmp_path, resumed_in_parallel, strategy, tmp_path):
        assert len(losses["full"]) == 11 and losses["full"][-1] < 0.9 * losses["full"][0]
        assert losses["resumed"] == pytest.approx(losses["full"][5:], rel=1e-6)
