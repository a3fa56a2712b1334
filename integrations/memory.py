"""Bytes of the states of Shampoo4 for a model of transformers, before training, on every rank.

    python -m sharded_shampoo4.integrations.memory CONFIG --world_size 8 --host fsdp2 preset=compact

CONFIG is a folder with a config.json, that file, or a name on the Hugging Face hub. No weights are loaded. Options of
Shampoo4 follow as NAME=VALUE; ``dtype=bfloat16`` is the type of the parameters.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from sharded_shampoo4 import estimate_memory
from sharded_shampoo4.report import format_bytes

from .quiet import quiet

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate, and the bytes of AdamW's states for all parameters."""
    quiet()
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # of retries: the error below says it all
    parser = argparse.ArgumentParser(
        usage="python -m sharded_shampoo4.integrations.memory CONFIG [options] [NAME=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="of the model")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options of Shampoo4")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks (1)")
    parser.add_argument("--host", help="none, ddp, fsdp2, hsdp or zero0 to zero3 (fsdp2; none in one process)")
    parser.add_argument("--replicas", type=int, help="with hsdp: complete copies of the model")
    flags = parser.parse_intermixed_args(argv)
    options = dict(text.partition("=")[::2] for text in flags.options)
    host = flags.host or ("fsdp2" if flags.world_size > 1 else "none")
    kind = options.pop("dtype", "float32").strip().removeprefix("torch.")
    if kind not in _DTYPES:
        parser.error(f"dtype must be one of {', '.join(_DTYPES)}, got {kind!r}")
    dtype: torch.dtype = getattr(torch, kind)
    if not Path(flags.config).exists() and flags.config.startswith(("/", "./", "../", "~")):
        parser.error(f"there is no folder or file {flags.config}")
    try:
        model = on_meta(flags.config, dtype)
    except (OSError, ValueError) as error:
        parser.error(f"{flags.config}: {str(error).partition(chr(10))[0]}")
    try:
        found = estimate_memory(
            model.named_parameters(), flags.world_size, host=host, replicas=flags.replicas, dtype=dtype, **options
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    count = sum(parameter.numel() for parameter in model.parameters())
    total, of_adamw = sum(found.total), 2 * (4 if host.startswith("zero") else dtype.itemsize)
    print(f"{type(model).__name__}, {count:,} parameters in {kind}, {host}\n\n{found}\n")
    print(f"All ranks: {format_bytes(total)}, {total / count:.2f} bytes per parameter.")
    print(f"One copy of AdamW's states: {format_bytes(of_adamw * count)}, {of_adamw:.2f} bytes per parameter.")


def on_meta(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make the model that a configuration describes, of the class that it names, without memory for weights."""
    config = AutoConfig.from_pretrained(name)
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = kind(config) if kind else AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model.to(dtype)


if __name__ == "__main__":
    main()
