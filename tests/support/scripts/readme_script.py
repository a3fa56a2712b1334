"""Run by torchrun for test_readme.py: the lines of the READMEs for each host, as they stand, and training."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  for the lines of the READMEs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: F401
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: F401
from torch.nn.parallel import DistributedDataParallel  # noqa: F401
from transformers import TrainingArguments

from sharded_shampoo4 import Shampoo4  # noqa: F401
from sharded_shampoo4.integrations.deepspeed import skip_cpu_compilation
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "README.md", ROOT / "integrations" / "README.md")


class Model(nn.Module):
    """Two layers; given labels it returns the loss, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(70, 80), nn.Linear(80, 5)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.layers[1](self.layers[0](x).relu())
        return hidden if labels is None else {"loss": nn.functional.cross_entropy(hidden, labels)}


def items() -> list[dict[str, Tensor]]:
    """What both ranks train on."""
    torch.manual_seed(1)
    return [{"x": torch.randn(70), "labels": torch.tensor(n % 5)} for n in range(64)]


def train(model: nn.Module, optimizer: Any, backward: Any) -> None:
    """Three steps with a factor update in each."""
    batch = {name: torch.stack([item[name] for item in items()]) for name in ("x", "labels")}
    for _ in range(3):
        loss = model(**batch)["loss"]
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    output, marks = sys.argv[1], {}
    on_cpu = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))  # it wants an accelerator otherwise
    known = {**globals(), "FullyShardedDataParallel": on_cpu}
    rehearse_on_cpu()
    skip_cpu_compilation()
    text = "".join(page.read_text() for page in PAGES)
    for host, code in re.findall(r"^\*\*(.+?)\*\*.+?```python\n(.+?)```", text, re.M | re.S):
        torch.manual_seed(0)
        names = ("data", "tensor") if "tensor" in host else ("data",)
        mesh = init_device_mesh("cpu", (1, 2)[-len(names) :], mesh_dim_names=names)
        plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
        known.update(model=Model(), mesh=mesh, plan=plan, data=items())
        known["group"] = dist.new_group([0, 1])
        known["loader"] = torch.utils.data.DataLoader(items(), batch_size=8)
        known["args"] = TrainingArguments(
            output, max_steps=3, save_strategy="no", report_to=[], accelerator_config={"use_configured_state": True}
        )
        exec(code, known)
        model, optimizer = known["model"], known["optimizer"]
        if host == "DeepSpeed":
            optimizer = known["engine"].basic_optimizer
            train(known["engine"], known["engine"], known["engine"].backward)
            known["engine"].destroy()
        elif host == "HF Trainer":
            known["trainer"].train()
            optimizer = known["trainer"].optimizer.optimizer
        else:
            train(model, optimizer, known["accelerator"].backward if host == "Accelerate" else Tensor.backward)
            optimizer = getattr(optimizer, "optimizer", optimizer)
        marks[host] = (type(optimizer).__name__, optimizer.state_bytes()["preconditioner"])
    Path(output, f"{dist.get_rank()}.json").write_text(json.dumps(marks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
