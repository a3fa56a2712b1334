"""Run by the launchers of test_configs.py: train_vit.py itself, and what its processes were really doing meanwhile.

    accelerate launch --config_file launch/configs/FILE tests/config_script.py FLAGS OF TRAIN_VIT

Every process writes OUTPUT_DIR/facts-RANK.json, what was seen at one linear layer and at the optimizer.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from support import launching  # noqa: F401  finds train_vit

# isort: split
import train_vit


def watch(run: train_vit.Run) -> dict[str, Any]:
    """A dictionary that fills while ``run`` trains."""
    seen: dict[str, Any] = {}
    layer = next(module for name, module in run.model.named_modules() if name.endswith("fc1"))

    def after_layer(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if module.training:
            seen["computes in"] = str(output.dtype)

    def after_model(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # FSDP2's parameters are DTensors, except while they are gathered.
        if module.training:
            seen["sharded between forward and backward"] = isinstance(layer.weight, DTensor)

    layer.register_forward_hook(after_layer)
    run.model.register_forward_hook(after_model)
    return seen


def optimizer_facts(run: train_vit.Run) -> dict[str, Any]:
    """What steps, on which numbers, and what DeepSpeed keeps in host memory."""
    optimizer = run.inner_optimizer
    by_deepspeed = getattr(run.model, "optimizer", None)  # ZeRO's, of an engine
    offloaded = [name for name in ("offload_optimizer", "offload_param") if getattr(by_deepspeed, name, False)]
    return {
        "host": run.host,
        "optimizer": type(optimizer).__name__,
        "steps in": sorted({str(parameter.dtype) for parameter in optimizer.state}),
        "offloaded": offloaded,
        "intervals": sorted({(g["statistics_interval"], g["root_interval"]) for g in optimizer.param_groups}),
    }


def main() -> None:
    train_vit.plot_curves = lambda *args: None  # takes long
    run = train_vit.Run(train_vit.parse_args())
    seen = watch(run)
    run.train()
    run.output_dir.joinpath(f"facts-{run.accelerator.process_index}.json").write_text(
        json.dumps({**seen, **optimizer_facts(run)})
    )
    run.finish()


if __name__ == "__main__":
    main()
