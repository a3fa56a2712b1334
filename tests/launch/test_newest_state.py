"""PortableAccelerator.load_state() without a folder: the newest state that is complete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import ProjectConfiguration
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.accelerate import PortableAccelerator

pytestmark = pytest.mark.usefixtures("one_process")


def prepared(folder: Path, automatic: bool = True) -> tuple[PortableAccelerator, nn.Module, Shampoo4]:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=automatic)
    accelerator = PortableAccelerator(project_config=project, cpu=True)
    model = nn.Linear(8, 8)
    return accelerator, *accelerator.prepare(model, Shampoo4(model.named_parameters()))


def test_without_a_folder_the_newest_complete_state_is_loaded(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        accelerator.load_state()
    weights = []
    for number in range(12):  # the name of the tenth comes before that of the third
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        accelerator.save_state()
        weights.append(model.weight.detach().clone())
        assert (tmp_path / "checkpoints" / f"checkpoint_{number}").is_dir()
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint_11" / "shampoo4")  # as if it had been killed
    accelerator.load_state()
    assert torch.equal(model.weight, weights[10])


def test_a_folder_is_needed_where_they_have_no_numbers(tmp_path: Path) -> None:
    accelerator, *_ = prepared(tmp_path, automatic=False)
    with pytest.raises(ValueError, match=r"load_state\(\) needs the folder"):
        accelerator.load_state()
