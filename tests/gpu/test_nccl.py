"""Two GPUs over NCCL train the model that one GPU trains, share out the states, and write and read checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import worlds
from support.spawned import run_spawned
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sharded_shampoo4 import Shampoo4, checkpoint

pytestmark = pytest.mark.gpu

WORLD_SIZE, STEPS = 2, 9
KIND = "mlp"
OPTIONS = {
    "method": "shampoo", "lr": 1e-2, "weight_decay": 0.1, "statistics_interval": 2, "root_interval": 4,
    "max_preconditioner_dim": 30, "min_quant_numel": 0,
}  # fmt: skip
# Options, and how far weights may have moved apart, relative to their way. On a GPU the size of a batch decides how its
# products are rounded, and so, where a value lies between two codes, which one it gets.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "32 bits": ({"bits": 32}, 1e-3),
    "default": ({}, 0.1),
    "compact": ({"preset": "shampoo-compact"}, 0.1),
}
HOSTS = ("ddp", "fsdp2")


class Training:
    """A model under a host, its optimizer, and gradients to replay."""

    def __init__(self, device: torch.device, host: str, seed: int = 0, **options: Any) -> None:
        self.device, self.host = device, host
        model: nn.Module = worlds.make_model(KIND, seed).to(device)
        own = {"mesh": init_device_mesh(device.type, (WORLD_SIZE,))} if host == "fsdp2" else {}
        self.model = worlds.wrap(model, host, **own)
        self.optimizer = Shampoo4(worlds.named(self.model, host).items(), **{**OPTIONS, **options})

    def train(self, steps: range) -> dict[str, Tensor]:
        """The weights afterwards, on the host."""
        for step in steps:
            gradients = worlds.make_gradients(KIND, step)
            on_device = {name: None if g is None else g.to(self.device) for name, g in gradients.items()}
            worlds.set_gradients(self.model, self.host, on_device)
            self.optimizer.step()
        return self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in worlds.full_parameters(self.model, self.host).items()}


def on_a_rank(rank: int, device_type: str, name: str, host: str, folder: str) -> dict[str, Any]:
    """Train; save, load into another model, and train both on."""
    options, _ = CASES[name]
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    training = Training(device, host, **options)
    weights = training.train(range(STEPS))
    checkpoint.save(training.optimizer, f"{folder}/saved", model=training.model)
    resumed = Training(device, host, seed=1, **options)
    checkpoint.load(resumed.optimizer, f"{folder}/saved", model=resumed.model)
    loaded = resumed.weights()
    more = range(STEPS, STEPS + 2)
    return {
        "weights": weights,
        "loaded": loaded,
        "after": training.train(more),
        "resumed": resumed.train(more),
        "bytes": training.optimizer.state_bytes()["preconditioner"],
        "devices": sorted({value.device.type for value in _tensors(training.optimizer)}),
    }


def _tensors(optimizer: Shampoo4) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.ndim]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_two_gpus_train_as_one_does(host: str, name: str, cuda: torch.device, tmp_path: Path) -> None:
    if torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} CUDA devices, there is {torch.cuda.device_count()}")
    check("nccl", cuda, host, name, tmp_path)


def check(backend: str, device: torch.device, host: str, name: str, folder: Path) -> None:
    options, tolerance = CASES[name]
    alone = Training(device, "none", **options)
    start = alone.weights()
    expected = alone.train(range(STEPS))
    results = run_spawned(backend, WORLD_SIZE, folder, on_a_rank, device.type, name, host, str(folder))
    for result in results:
        assert apart(result["weights"], expected, start) <= tolerance
        assert all(map(torch.equal, result["weights"].values(), results[0]["weights"].values()))
        assert all(map(torch.equal, result["loaded"].values(), result["weights"].values()))
        assert apart(result["resumed"], result["after"], result["weights"]) <= tolerance
        assert result["devices"] == [device.type]
    kept = [result["bytes"] for result in results]
    assert sum(kept) == alone.optimizer.state_bytes()["preconditioner"]
    assert max(kept) < 0.75 * sum(kept)


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The distance of two models, relative to how far the other has moved from ``start``."""
    distance = sum(float((one[key] - other[key]).square().sum()) for key in one)
    way = sum(float((other[key] - start[key]).square().sum()) for key in one)
    return (distance / way) ** 0.5
