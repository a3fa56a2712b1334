"""Run by ``accelerate launch`` in test_accelerate.py: a small model under the host that the YAML file asks for.

First without the rehearsal, when what Accelerate falls back to must be found out; then with it: the host, the gathered
model, a saved and loaded state, and Shampoo4.

python tests/accelerate_script.py FOLDER EXPECTED
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.integrations.accelerate import PortableAccelerator, consolidate_before_saving
from sharded_shampoo4.integrations.rehearsal import (
    check_distribution,
    describe_distribution,
    full_state_dict,
    rehearse_on_cpu,
)


class Consolidating(torch.optim.AdamW):
    """As an optimizer with spread states: ``state_dict`` must follow a collective call on all processes."""

    consolidated = 0

    def consolidate_state_dict(self) -> None:
        self.consolidated += 1
        torch.distributed.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "consolidated": self.consolidated}


def prepared(**options: Any) -> tuple[PortableAccelerator, nn.Module, Any, dict[str, torch.Tensor]]:
    accelerator = PortableAccelerator(**options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 13), nn.ReLU(), nn.Linear(13, 5))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model, optimizer = accelerator.prepare(model, Consolidating(model.parameters(), lr=0.1))
    return accelerator, model, optimizer, start


def step(accelerator: PortableAccelerator, model: nn.Module, optimizer: Any) -> float:
    """One step on this process's part of 8 rows; the mean loss over all processes before it."""
    rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    part = rows.chunk(accelerator.num_processes)[accelerator.process_index]
    loss = model(part).square().mean()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.gather(loss.detach()).mean().item()


def without_rehearsal(expected: str, **options: Any) -> None:
    """Print how it is refused that Accelerate runs something else than ``expected``; by Accelerate itself for HSDP."""
    try:
        accelerator, model, *_ = prepared(**options)
        check_distribution(accelerator, model)
    except (RuntimeError, ValueError) as error:
        print(f"refused: {error}\n", end="", flush=True)
    else:
        assert describe_distribution(accelerator, model) == expected
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def with_rehearsal(folder: Path, expected: str) -> None:
    assert rehearse_on_cpu()
    accelerator, model, optimizer, start = prepared()
    check_distribution(accelerator, model)
    assert describe_distribution(accelerator, model) == expected, describe_distribution(accelerator, model)
    consolidate_before_saving(accelerator, optimizer)
    gathered = full_state_dict(accelerator, model)
    if accelerator.is_main_process:
        assert gathered.keys() == start.keys()
        assert all(torch.equal(gathered[name], start[name]) for name in start)
    step(accelerator, model, optimizer)
    accelerator.save_state(folder)
    losses = [step(accelerator, model, optimizer) for _ in range(2)]
    accelerator.load_state(folder)
    assert [step(accelerator, model, optimizer) for _ in range(2)] == losses, "a loaded state goes on as the saved one"
    assert optimizer.optimizer.consolidated == (1 if expected.startswith("DDP") else 0)
    accelerator.print("losses", *losses)
    model, optimizer = accelerator.free_memory(model, optimizer)
    first, turned = (train_with_shampoo4(accelerator, turned, folder / "shampoo4") for turned in (False, True))
    if accelerator.is_main_process:
        assert all(torch.equal(first[name], turned[name]) for name in first), "prepare() in both orders is one training"
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    assert rehearse_on_cpu()
    accelerator = PortableAccelerator(mixed_precision="bf16")
    for method in ("shampoo", "soap"):
        trained = train_with_shampoo4(accelerator, False, folder / f"bf16 {method}", method)
        if accelerator.is_main_process:
            assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    accelerator.print("shampoo4 trained in both orders and in mixed precision")
    accelerator.end_training()


def train_with_shampoo4(
    accelerator: PortableAccelerator, turned: bool, folder: Path, method: str = "shampoo"
) -> dict[str, torch.Tensor]:
    """Four steps; prepared as (model, optimizer) or turned round. Returns the whole model, on the main process.

    Then two more steps, and the same again from the state that was saved before them.
    """
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(20, 13), nn.ReLU(), nn.Linear(13, 5))
    options = {"method": method, **({"statistics_interval": 1, "root_interval": 2} if method == "shampoo" else {})}
    optimizer: Any = Shampoo4(model.named_parameters(), lr=0.01, **options)
    estimate = estimate_memory(model.named_parameters(), host="none", **options)
    if turned:
        optimizer, model = accelerator.prepare(optimizer, model)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    check_distribution(accelerator, model)
    losses = [step(accelerator, model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0], losses
    held = torch.tensor(optimizer.optimizer.state_bytes()["preconditioner"])
    assert accelerator.reduce(held).item() == estimate.preconditioner[0]
    if method == "shampoo":
        assert estimate.preconditioner[0] == 2 * 4 * (13**2 + 20**2 + 5**2 + 13**2) + 4 * 8
    trained = {name: value.clone() for name, value in full_state_dict(accelerator, model).items()}
    accelerator.save_state(folder)
    losses = [step(accelerator, model, optimizer) for _ in range(2)]
    accelerator.load_state(folder)
    assert [step(accelerator, model, optimizer) for _ in range(2)] == losses, "a loaded state goes on as the saved one"
    accelerator.free_memory(model, optimizer)
    return trained


if __name__ == "__main__":
    without_rehearsal(sys.argv[2])
    without_rehearsal(sys.argv[2], cpu=True)
    with_rehearsal(Path(sys.argv[1]), sys.argv[2])
