"""What each rank keeps and sends when a vision transformer is trained with 4-bit Shampoo, from shapes alone.

python launch/report_scale.py [--host fsdp2 ddp] [--world_size 2 4 8 64] [--bits 4]
python launch/report_scale.py --hidden_size 1280 --num_hidden_layers 32 --patch_size 14

Without a size, ViT-B/16 and ViT-L/16 on 224 x 224 images. A table per model and host, a line per number of ranks:

* preconditioner bytes of the rank that keeps most, beside an even share of what one process would keep;
* AdamW's bytes on the rank that keeps most;
* bytes that the optimizer sends in an ordinary step on the rank that sends most, beside what the host itself sends
  on every rank for N float32 parameters: FSDP2 gathers parameters twice and reduces gradients once, 12 N (W-1)/W
  bytes; DDP reduces gradients, 8 N (W-1)/W bytes.

Nothing is computed and no rank is started.
"""

from __future__ import annotations

import argparse
import math

from rich.console import Console
from rich.table import Table

from sharded_shampoo4 import estimate_memory
from sharded_shampoo4.memory import format_bytes

SIZES = {"ViT-B": (768, 12), "ViT-L": (1024, 24)}  # hidden size, layers
HOST_BYTES = {"fsdp2": 12, "ddp": 8}  # that the host sends per parameter, times (W-1)/W


def vit_shapes(
    hidden: int, layers: int, *, image: int = 224, patch: int = 16, classes: int = 1000
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of transformers' ViTForImageClassification."""
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, hidden),
        "vit.embeddings.position_embeddings": (1, (image // patch) ** 2 + 1, hidden),
        "vit.embeddings.patch_embeddings.projection.weight": (hidden, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (hidden,),
    }

    def linear(name: str, into: int, out: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})

    for layer in (f"vit.layers.{index}" for index in range(layers)):
        for projection in "qkvo":
            linear(f"{layer}.attention.{projection}_proj", hidden, hidden)
        norm(f"{layer}.layernorm_before")
        norm(f"{layer}.layernorm_after")
        linear(f"{layer}.mlp.fc1", hidden, 4 * hidden)
        linear(f"{layer}.mlp.fc2", 4 * hidden, hidden)
    norm("vit.layernorm")
    linear("classifier", hidden, classes)
    return shapes


def report(title: str, shapes: dict[str, tuple[int, ...]], host: str, worlds: list[int], bits: int) -> Table:
    """A line per number of ranks."""
    parameters = sum(map(math.prod, shapes.values()))
    alone = estimate_memory(shapes, host="none", bits=bits).preconditioner[0]
    table = Table(title=f"{title}, {parameters:,} parameters, {host}, {bits} bits", title_justify="left")
    for column in (
        "ranks", "preconditioner, most", "even share", "ratio", "base, most", "sent per step, most", "mean",
        f"{host} itself", "ratio",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for world_size in worlds:
        estimate = estimate_memory(shapes, world_size, host=host, bits=bits)
        kept, even = max(estimate.preconditioner), alone / world_size
        sent, own = max(estimate.traffic), HOST_BYTES[host] * parameters * (world_size - 1) / world_size
        mean = sum(estimate.traffic) / world_size
        sizes = [format_bytes(count) for count in (kept, even, max(estimate.base), sent, mean, own)]
        ratio, of_host = f"{kept / even:.3f}", f"{sent / own:.3f}" if own else ""
        table.add_row(str(world_size), *sizes[:2], ratio, *sizes[2:], of_host)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, help="another size of ViT, with --num_hidden_layers")
    parser.add_argument("--num_hidden_layers", type=int, help="with --hidden_size")
    parser.add_argument("--image_size", type=int, default=224, help="side in pixels (224)")
    parser.add_argument("--patch_size", type=int, default=16, help="side in pixels (16)")
    parser.add_argument("--num_labels", type=int, default=1000, help="classes (1000)")
    parser.add_argument("--host", nargs="+", choices=tuple(HOST_BYTES), default=list(HOST_BYTES), help="(both)")
    parser.add_argument("--world_size", nargs="+", type=int, default=[2, 4, 8, 64], help="(2 4 8 64)")
    parser.add_argument("--bits", type=int, default=4, help="(4)")
    flags = parser.parse_args()
    if (flags.hidden_size is None) != (flags.num_hidden_layers is None):
        parser.error("--hidden_size and --num_hidden_layers go together")

    sizes = dict(SIZES)
    if flags.hidden_size is not None:
        sizes = {f"ViT {flags.hidden_size} x {flags.num_hidden_layers}": (flags.hidden_size, flags.num_hidden_layers)}
    console = Console(width=140)
    for name, (hidden, layers) in sizes.items():
        shapes = vit_shapes(hidden, layers, image=flags.image_size, patch=flags.patch_size, classes=flags.num_labels)
        for host in flags.host:
            console.print(report(f"{name}/{flags.patch_size}", shapes, host, flags.world_size, flags.bits))


if __name__ == "__main__":
    main()
