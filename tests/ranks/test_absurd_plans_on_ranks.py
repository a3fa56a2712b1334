"""Warnings about costly factors see whole shapes: of FSDP2's shards, of FSDP1's after bind(), of zero.Init's parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from torch import nn

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations import fsdp

BOTH_SIDES: dict[str, Any] = {"max_aspect": 0, "batch_dims": 0}  # one matrix each, with factors of both sides
HOSTS = ("ddp", "fsdp1", "fsdp2", "zero.Init", "zero3")


class Adapter(nn.Module):
    """A low-rank adapter, which as a shard looks less lopsided, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(2048, 8, bias=False), nn.Linear(8, 2048, bias=False)
        self.experts = nn.Parameter(torch.zeros(4, 32, 16))


def told(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function()
    texts = [str(warning.message) for warning in found]
    return result, [text for text in texts if "the factors of" in text]


def make(parameters: Any) -> Shampoo4:
    return Shampoo4(parameters, **BOTH_SIDES)


def warned(rank: int) -> dict[str, list[str]]:
    zero.prepare()
    found = {}
    for host in ("ddp", "fsdp1", "fsdp2"):
        model = hosts.wrap(Adapter(), host)
        optimizer, found[host] = told(lambda model=model, host=host: make(hosts.named(model, host).items()))
        if host == "fsdp1":
            assert not found[host], "it does not know shapes yet"
            _, found[host] = told(lambda model=model, optimizer=optimizer: fsdp.bind(optimizer, model))
    config = zero.configuration("zero3", optimizer={"type": "Shampoo4", "params": BOTH_SIDES})
    with zero.deepspeed.zero.Init(config_dict_or_path=config):
        model = Adapter()
    _, found["zero.Init"] = told(lambda: make(model.named_parameters()))
    engine, found["zero3"] = told(lambda: zero.start(zero.Replay(Adapter()), config))
    engine.destroy()
    return found


@pytest.mark.parametrize("host", HOSTS)
def test_whole_shapes_are_told(host: str) -> None:
    for found in hosts.run_ranks_once(2, warned):
        (costs,) = found[host]
        assert "3 of 3 parameters take 1.2 MiB, and the parameters themselves 136.0 KiB" in costs
        assert "(8, 2048) has 538.4 KiB of factors for 64.0 KiB of values" in costs
        assert "(2048, 8) has 538.4 KiB" in costs
