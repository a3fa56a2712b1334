"""Bytes of the states of Shampoo4 for a model of transformers, before training, on every rank.

    python -m sharded_shampoo4.integrations.memory CONFIG --world_size 8 --host fsdp2 preset=compact

CONFIG is a folder with a config.json, that file, or a name on the Hugging Face hub. No weights are loaded. Options of
Shampoo4 follow as NAME=VALUE.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from sharded_shampoo4 import estimate_memory
from sharded_shampoo4.report import format_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate, and the bytes of AdamW's states for all parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="of the model")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options of Shampoo4")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks (1)")
    parser.add_argument("--host", help="none, ddp, fsdp2, hsdp or zero0 to zero3 (fsdp2; none in one process)")
    parser.add_argument("--replicas", type=int, help="with hsdp: complete copies of the model")
    flags = parser.parse_intermixed_args(argv)
    options = dict(text.partition("=")[::2] for text in flags.options)
    host = flags.host or ("fsdp2" if flags.world_size > 1 else "none")
    model = on_meta(flags.config)
    try:
        found = estimate_memory(
            model.named_parameters(), flags.world_size, host=host, replicas=flags.replicas, **options
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    count = sum(parameter.numel() for parameter in model.parameters())
    total = sum(found.total)
    print(f"{type(model).__name__}, {count:,} parameters in float32, {host}\n\n{found}\n")
    print(f"All ranks: {format_bytes(total)}, {total / count:.2f} bytes per parameter.")
    print(f"One copy of AdamW's states: {format_bytes(8 * count)}, 8.00 bytes per parameter.")


def on_meta(name: str) -> nn.Module:
    """Make the model that a configuration describes, of the class that it names, without memory for weights."""
    config = AutoConfig.from_pretrained(name)
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = kind(config) if kind else AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model.float()


if __name__ == "__main__":
    main()
