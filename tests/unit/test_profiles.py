"""What a profile and the count of bytes tell of a step."""

from __future__ import annotations

from collections import Counter

import torch
from support.meta_steps import RANK, FakeRanks, count_step
from torch.profiler import ProfilerActivity, profile

from sharded_shampoo4 import Shampoo4, estimate_memory

SHAPES = {"first": (16, 24), "second": (24, 16), "bias": (16,)}
ORDINARY = {"precondition", "graft", "send_back", "base"}


def labels_of(optimizer: Shampoo4, parameters: list[torch.nn.Parameter]) -> set[str]:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    names = Counter(event.name for event in recorded.events())
    return {name.removeprefix("shampoo4::") for name in names if name.startswith("shampoo4::")}


def test_a_profile_shows_the_parts_of_a_step() -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
    optimizer = Shampoo4(parameters, method="shampoo", statistics_interval=2, root_interval=4, interval_warmup=False)
    steps = [labels_of(optimizer, parameters) for _ in range(5)]
    assert steps[0] == {"base"}, "before the first statistics"
    assert steps[1] == {"gather", "statistics", "send_back", "base"}
    assert steps[3] == {"gather", "statistics", "roots", *ORDINARY}
    assert steps[4] == {"gather", *ORDINARY}


def test_bytes_sent_are_counted_on_when_factors_are_placed_anew() -> None:
    alone = Shampoo4([torch.nn.Parameter(torch.randn(4, 4))])
    assert alone.traffic_bytes() == 0
    with FakeRanks(RANK, 8, SHAPES) as ranks:
        parameters = ranks.parameters()
        options = {"method": "shampoo", "statistics_interval": 2, "root_interval": 2, "interval_warmup": False}
        optimizer = Shampoo4(parameters.items(), **options)
        sent = []
        for step in range(6):
            if step == 4:  # the plan is made anew; meta tensors forget the count of steps
                optimizer.param_groups[0]["scratch_mib"] = 128
            count_step(optimizer, parameters.values(), answer=int(step == 0))
            sent.append(optimizer.traffic_bytes())
        assert sent[0] == 0 < sent[1] < sent[2] < sent[3] == sent[4] < sent[5]
        assert sent[2] - sent[1] == sent[5] - sent[4] == estimate_memory(SHAPES, 8, **options).traffic[RANK]
