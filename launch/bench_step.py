"""Step times and state bytes of Shampoo4, its 32-bit and naive modes and torch's AdamW, side by side in one run.

python launch/bench_step.py [--device cuda]

The model is a vision transformer on 32 x 32 images in patches of 4; the gradients are real ones of random images and
are replayed, so that only the optimizers are timed. Times are medians over rounds in which every optimizer takes its
turn: processor time on the CPU, elapsed time on an accelerator. A statistics step and a root step are timed apart from
an ordinary one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import ViTConfig, ViTForImageClassification

from sharded_shampoo4 import Shampoo4

STATISTICS_INTERVAL, ROOT_INTERVAL = 4, 8  # in step 4 statistics are due, in step 8 roots as well
KINDS = {"ordinary": (1, 2, 3, 5, 6, 7), "statistics": (4,), "statistics and root": (0,)}  # steps modulo 8


def gradients_of_a_vit(hidden: int, layers: int, device: torch.device) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
        num_attention_heads=6, num_labels=100,
    )  # fmt: skip
    model = ViTForImageClassification(config).to(device)
    replayed = []
    for _ in range(4):
        images, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(100, (16,), device=device)
        model.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        replayed.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return replayed


def clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def elapsed() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384, help="of the ViT (384)")
    parser.add_argument("--num_hidden_layers", type=int, default=2, help="(2)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of 8 steps, after two for warming up (6)")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    flags = parser.parse_args()

    device = torch.device(flags.device)
    replayed = gradients_of_a_vit(flags.hidden_size, flags.num_hidden_layers, device)
    intervals = {"statistics_interval": STATISTICS_INTERVAL, "root_interval": ROOT_INTERVAL}
    choices: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "AdamW": lambda p: torch.optim.AdamW(p),
        "Shampoo4, 32 bits": lambda p: Shampoo4(p, bits=32, **intervals),
        "Shampoo4, 4 bits": lambda p: Shampoo4(p, **intervals),
        "Shampoo4, 4 bits, naive": lambda p: Shampoo4(p, quantize="preconditioner", **intervals),
    }
    parameters = {name: [torch.nn.Parameter(torch.zeros_like(g)) for g in replayed[0]] for name in choices}
    optimizers = {name: make(parameters[name]) for name, make in choices.items()}
    times: dict[str, dict[int, list[float]]] = {name: {} for name in choices}
    now = clock(device)
    for step in range(1, 8 * (flags.rounds + 2) + 1):
        for name, optimizer in optimizers.items():
            for parameter, gradient in zip(parameters[name], replayed[step % len(replayed)], strict=True):
                parameter.grad = gradient.clone()
            start = now()
            optimizer.step()
            if step > 16:
                times[name].setdefault(step % 8, []).append(now() - start)

    elements = sum(p.numel() for p in parameters["AdamW"])
    table = Table(
        title=f"{elements:,} parameters, {torch.get_num_threads()} threads, {device}; milliseconds (x 32 bits)"
    )
    for column in ("optimizer", *(f"{kind} step" for kind in KINDS), "state bytes / parameter", "of it preconditioner"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    medians = {
        name: [statistics.median(t for step in steps for t in times[name][step]) for steps in KINDS.values()]
        for name in choices
    }
    for name, optimizer in optimizers.items():
        cells = [
            f"{1e3 * own:.1f} ({own / reference:.2f})"
            for own, reference in zip(medians[name], medians["Shampoo4, 32 bits"], strict=True)
        ]
        states = [value for state in optimizer.state.values() for value in state.values()]
        base = sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))
        own_bytes = optimizer.state_bytes()["preconditioner"] if isinstance(optimizer, Shampoo4) else 0
        table.add_row(name, *cells, f"{(base + own_bytes) / elements:.2f}", f"{own_bytes / elements:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
