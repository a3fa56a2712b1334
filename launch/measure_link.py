"""What the optimizer's exchange costs on a given link: step times of Shampoo4 and AdamW, and the exchange's share.

    torchrun --nnodes 2 --node_rank RANK --nproc_per_node 8 --master_addr HOST --master_port PORT launch/measure_link.py

Without a cluster, two emulated hosts with 1 Gbit/s and 1 ms between them (as root; tests/support/cluster_emulation.py):

    OMP_NUM_THREADS=1 python tests/support/cluster_emulation.py --rate_mbit 1000 --delay_ms 1 torchrun --nnodes 2 \\
        --node_rank {host} --nproc_per_node 2 --master_addr node-a --master_port 29500 launch/measure_link.py

A ViT takes steps on random images under FSDP2, HSDP (sharded within a host) or DDP. Times are the median over steps of
the slowest rank's. "exchange" is the part of a step in which a rank packs, sends, awaits and unpacks gradients and
directions; what is under way while blocks are computed does not count, waiting for a rank that computes longer does.
"agreement" are the few bytes by which ranks make sure that they do the same. Megabytes are those that the
fullest rank sends to other ranks in a step's exchange. An ordinary step applies inverse roots that are there already.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from vit_model import PRESETS
from wrapping import layers_of, wrap

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.exchange import Exchange
from sharded_shampoo4.ranks import Ranks

STATISTICS, ROOTS = 4, 8  # intervals: short, so that a few steps hold some of each kind
KINDS = ("ordinary", "statistics", "statistics and roots")
PARTS = ("step", "optimizer", "exchange", "agreement", "megabytes")


class Clock:
    """Seconds of the parts of the current step, and what its exchange sent."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def count(self, part: str, sign: int = 1) -> Iterator[None]:
        """Add the time within to ``part``, or take it off."""
        begun = time.perf_counter()
        yield
        self.spent[part] += sign * (time.perf_counter() - begun)

    def watch(self) -> None:
        """Time every exchange and every agreement from now on."""
        run, any_, gather, agree = Exchange.run, Ranks.any, Ranks.gather, Ranks.raise_together

        def timed_run(self_: Exchange, shards: Any, targets: Any, active: Any, directed: Any, compute: Any) -> None:
            def timed_compute(*arguments: Any) -> Any:
                with self.count("exchange", -1):
                    return compute(*arguments)

            sent = self_.bytes_sent
            with self.count("exchange"):
                run(self_, shards, targets, active, directed, timed_compute)
            self.spent["megabytes"] += (self_.bytes_sent - sent) / 1e6

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def timed_method(*arguments: Any) -> Any:
                with self.count("agreement"):
                    return method(*arguments)

            return timed_method

        Exchange.run = timed_run  # type: ignore[method-assign]
        Ranks.any, Ranks.gather = timed(any_), timed(gather)  # type: ignore[method-assign]
        Ranks.raise_together = timed(agree)  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("fsdp2", "hsdp", "ddp"), default="fsdp2", help="(fsdp2)")
    models = [name for name in PRESETS if name.startswith("vit")]
    parser.add_argument("--model", choices=models, default="vit-small", help="(vit-small)")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="(4)")
    parser.add_argument("--image_size", type=int, default=96, help="side in pixels (96)")
    parser.add_argument("--batch_size", type=int, default=8, help="images per process (8)")
    parser.add_argument("--rounds", type=int, default=3, help=f"rounds of {ROOTS} steps, after one for warming up (3)")
    flags = parser.parse_args()

    accelerated = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if accelerated else torch.device("cpu")
    if accelerated:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo")
    clock = Clock()
    clock.watch()
    rows = [(name, measure(flags, name, device, clock)) for name in ("adamw", "shampoo4")]
    if dist.get_rank() == 0:
        report(flags, rows)
    dist.destroy_process_group()


def measure(flags: argparse.Namespace, optimizer_name: str, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Median over the steps of each kind of the slowest rank's times; with AdamW all steps are ordinary."""
    torch.manual_seed(0)
    model = build(flags, device)
    sizes = [p.numel() for p in model.parameters()]
    if optimizer_name == "shampoo4":
        named = model.named_parameters()
        optimizer = Shampoo4(named, lr=1e-3, statistics_interval=STATISTICS, root_interval=ROOTS)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(flags.batch_size, 3, flags.image_size, flags.image_size, device=device)
    labels = torch.randint(1000, (flags.batch_size,), device=device)
    taken: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for step in range(1, ROOTS * (flags.rounds + 1) + 1):
        clock.spent = dict.fromkeys(PARTS, 0.0)
        dist.barrier()
        with clock.count("step"):
            loss = F.cross_entropy(model(pixel_values=images).logits, labels)
            loss.backward()
            finish(device)
            with clock.count("optimizer"):
                optimizer.step()
                finish(device)
            optimizer.zero_grad()
        slowest = torch.tensor([clock.spent[part] for part in PARTS], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if step > ROOTS:  # there are inverse roots
            due = (step % STATISTICS == 0) + (step % ROOTS == 0) if optimizer_name == "shampoo4" else 0
            taken[KINDS[due]].append(slowest)
    medians = {
        kind: dict(zip(PARTS, torch.stack(steps).median(0).values.tolist(), strict=True))
        for kind, steps in taken.items()
        if steps
    }
    return {"parameters": sum(sizes), **medians}


def build(flags: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model as the host holds it."""
    sizes = {**PRESETS[flags.model], "num_hidden_layers": flags.num_hidden_layers, "image_size": flags.image_size}
    model = ViTForImageClassification(ViTConfig(**sizes, num_labels=1000)).to(device)
    nodes = dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
    return wrap(model, flags.host, layers_of(model), copies=nodes, device_type=device.type)


def finish(device: torch.device) -> None:
    """Wait for what the accelerator still does, so that times belong to what took them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(flags: argparse.Namespace, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Print the table."""
    ranks, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    table = Table(
        title=f"{flags.model} with {flags.num_hidden_layers} layers, {rows[0][1].pop('parameters') / 1e6:.1f} M "
        f"parameters, {flags.host} on {ranks // local} x {local} processes; milliseconds"
    )
    table.add_column("")
    for column in ("step", "optimizer", "exchange", "its share", "agreement", "megabytes"):
        table.add_column(column, justify="right")
    for name, kinds in rows:
        kinds.pop("parameters", None)
        for kind, spent in kinds.items():
            share = spent["exchange"] / spent["step"]
            times = [f"{1e3 * spent[part]:.1f}" for part in ("step", "optimizer", "exchange")]
            agreement, sent = f"{1e3 * spent['agreement']:.1f}", f"{spent['megabytes']:.2f}"
            table.add_row(f"{name}, {kind}", *times, f"{share:.1%}", agreement, sent)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
