"""When Shampoo4's exchange sends, and when it computes: a step's batches on every rank, as a trace and as text.

    python launch/timeline.py                                  2 gloo processes, FSDP2; runs/timeline
    python launch/timeline.py --host ddp --accumulate 4
    torchrun --nproc_per_node 4 launch/timeline.py

A stack of transformer layers takes a few steps on random inputs; an ordinary step of the optimizer and one with
statistics and roots due, a refresh, are recorded. Work goes batch by batch: gradients travel to the blocks' owners,
which compute, and directions travel back. A line for each batch tells, in milliseconds from the start of the rank's
step, from when to when its gradients were under way, it was computed, its directions were under way, and when those
that came here were written. In its bar "g" and "d" are gradients and directions under way and "#" is computing: what
travels in columns where another line has "#" costs no time. A transfer is under way from when this rank posts it until
gloo has done it, which includes waiting for ranks that post later. It is in time if it was done before this rank had
nothing else to do than wait for it.

--output_dir gets timeline.json, with all of this, and of each kind and rank a trace with torch's operations, for
chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler reports each start

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from timeline_record import Recorder, totals
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile
from wrapping import wrap

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.memory import format_bytes

INTERVAL = 3  # steps from one refresh to the next
RECORDED = {"ordinary": 5, "refresh": 6}  # steps, once each kind has come
HEAD, TOKENS = 32, 16  # elements of a head, tokens of a sequence


class Layer(nn.Module):
    """A layer of a vision transformer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norms[0](x)
        heads = (part(seen).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        added: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return added


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
        on_a_rank(flags)
        dist.destroy_process_group()
        return
    multiprocessing.set_forkserver_preload(["sharded_shampoo4", "torch.distributed.fsdp", "torch.profiler", "rich"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_started, (flags, folder), nprocs=flags.world_size, start_method="forkserver")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("fsdp2", "ddp"), default="fsdp2", help="what wraps the model (fsdp2)")
    parser.add_argument("--world_size", type=int, default=2, help="processes, unless torchrun has started them (2)")
    parser.add_argument("--hidden_size", type=int, default=192, help=f"a multiple of {HEAD} (192)")
    parser.add_argument("--layers", type=int, default=4, help="of the stack (4)")
    parser.add_argument("--batch_size", type=int, default=8, help=f"sequences of {TOKENS} tokens for each process (8)")
    parser.add_argument("--scratch_mib", type=int, default=8, help="the optimizer's: less makes more batches (8)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-steps of each step (1)")
    parser.add_argument("--width", type=int, default=60, help="characters of a bar (60)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/timeline"), help="for the files (runs/timeline)")
    flags = parser.parse_args(arguments)
    sizes = (flags.world_size, flags.layers, flags.batch_size, flags.scratch_mib, flags.accumulate, flags.width)
    if min(sizes) < 1:
        parser.error("all sizes and numbers must be positive")
    if int(os.environ.get("WORLD_SIZE", flags.world_size)) < 2:
        parser.error("at least 2 processes: one by itself sends nothing")
    if flags.hidden_size < HEAD or flags.hidden_size % HEAD:
        parser.error(f"--hidden_size takes multiples of {HEAD}, got {flags.hidden_size}")
    return flags


def _started(rank: int, flags: argparse.Namespace, folder: str) -> None:
    """A process that this script has started."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=flags.world_size)
    on_a_rank(flags)
    dist.barrier()
    dist.destroy_process_group()


def on_a_rank(flags: argparse.Namespace) -> None:
    """Train, record, and let rank 0 tell."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(Layer(flags.hidden_size) for _ in range(flags.layers)))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model = wrap(model, flags.host, model.children())
    options: dict[str, Any] = {"scratch_mib": flags.scratch_mib, "statistics_interval": INTERVAL}
    optimizer = Shampoo4(model.named_parameters(), lr=1e-3, root_interval=INTERVAL, **options)
    recorder = Recorder()
    recorder.watch()
    torch.manual_seed(1 + dist.get_rank())
    mine: dict[str, Any] = {}
    for step in range(1, max(RECORDED.values()) + 1):
        kind = next((kind for kind, number in RECORDED.items() if number == step), None)
        sent = [backward(model, micro == flags.accumulate, flags, recorder) for micro in range(1, flags.accumulate + 1)]
        before = recorder.bytes_sent
        recording = profile(activities=[ProfilerActivity.CPU]) if kind else None
        with recording or nullcontext():
            dist.barrier()
            with recorder.step():
                optimizer.step()
        sent[-1] += recorder.bytes_sent - before
        optimizer.zero_grad()
        if kind and recording:
            recording.export_chrome_trace(str(flags.output_dir / f"{kind}-rank{dist.get_rank()}.json"))
            mine[kind] = {**recorder.summary(), "sent_by_micro_step": sent}
    ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        estimate = estimate_memory(shapes, dist.get_world_size(), host=flags.host, **options)
        report(flags, {kind: [rank[kind] for rank in ranks] for kind in RECORDED}, estimate.traffic)


def backward(model: Any, last: bool, flags: argparse.Namespace, recorder: Recorder) -> int:
    """A micro-step: gradients of random inputs, which the host adds up over ranks in the ``last`` of a step only.

    Returns the bytes that the optimizer has sent meanwhile.
    """
    before = recorder.bytes_sent
    if flags.host == "fsdp2":
        model.set_requires_gradient_sync(last)
    with nullcontext() if last or flags.host == "fsdp2" else model.no_sync():
        inputs = torch.randn(flags.batch_size, TOKENS, flags.hidden_size)
        (model(inputs).square().mean() / flags.accumulate).backward()
    return recorder.bytes_sent - before


def report(flags: argparse.Namespace, steps: dict[str, list[dict[str, Any]]], traffic: list[int]) -> None:
    """Print every rank's lines and totals, and write the file."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for kind, ranks in steps.items():
        longest = max(rank["step_ms"] for rank in ranks)
        console.print(f"\n{flags.host}, {len(ranks)} ranks, {kind} step; ms from its start, bars of {longest:.1f} ms")
        for number, rank in enumerate(ranks):
            for batch in rank["batches"]:
                console.print(f"rank {number}  {line(batch)}  |{bar(batch, longest, flags.width)}|")
        for number, rank in enumerate(ranks):
            console.print(f"rank {number}  {told(totals(rank))}")
            console.print(f"        the optimizer sent {sent_text(rank['sent_by_micro_step'])}")
    estimated = ", ".join(map(format_bytes, traffic))
    console.print(f"\nestimate_memory says of an ordinary step, by rank: {estimated}")
    file = flags.output_dir / "timeline.json"
    file.write_text(json.dumps({"host": flags.host, "estimated_bytes": traffic, **steps}, indent=1))
    console.print(f"written: {file}, and a trace of each kind of step and rank beside it")


def spans(batch: dict[str, Any]) -> dict[str, Any]:
    """From when to when each part of a batch was; None for computing of which this rank had nothing."""
    ways = {way: batch[way]["under_way"] for way in ("gradients", "directions")}
    return {"gradients": ways["gradients"], "computed": batch["computed"], "directions": ways["directions"]}


def line(batch: dict[str, Any]) -> str:
    """When a batch's parts were."""
    told = {name: f"{span[0]:.1f}-{span[1]:.1f}" if span else "not here" for name, span in spans(batch).items()}
    parts = "  ".join(f"{name} {span:<15}" for name, span in told.items())
    return f"batch {batch['batch']:>2}  {parts}  written {batch['written']:<7.1f}"


def bar(batch: dict[str, Any], longest: float, width: int) -> str:
    """The same as characters, later parts over earlier ones."""
    drawn = [" "] * width
    for (_, span), sign in zip(spans(batch).items(), "g#d", strict=True):
        if span:
            begin, end = (min(width - 1, int(at / longest * width)) for at in span)
            drawn[begin : end + 1] = sign * (end + 1 - begin)
    return "".join(drawn)


def told(total: dict[str, Any]) -> str:
    """A rank's totals in words."""
    return (
        f"step {total['step_ms']:.1f} ms: {total['computing_ms']:.1f} computing, {total['waiting_ms']:.1f} waiting for "
        f"the exchange; transfers were under way {total['transfer_ms']:.1f} ms, {total['overlapped_share']:.0%} of it "
        f"while computing; {total['in_time']} of {total['transfers']} in time"
    )


def sent_text(sent: list[int]) -> str:
    """What was sent in each micro-step."""
    if len(sent) == 1:
        return format_bytes(sent[0])
    silent = sum(count == 0 for count in sent)
    return f"{', '.join(map(format_bytes, sent))} in its micro-steps: nothing in {silent} of {len(sent)}"


if __name__ == "__main__":
    main()
