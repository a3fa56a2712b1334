"""Options by patterns of names in DeepSpeed's configuration: what param groups of the program give, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.zero_cases import SOAP
from torch import Tensor, nn

STAGES = range(4)
STEPS = 6
PATTERNS: list[dict[str, Any]] = [
    {"pattern": r"middle\.weight", "precondition": False, "lr": 2e-2},
    {"pattern": r"stem\.weight|middle", "split_rows": [2], "statistics_interval": 3},
    {"pattern": r"bias$", "weight_decay": "0.0"},
]


def groups_by_hand(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """What PATTERNS say, as a program would write it."""
    first = [pair for pair in named if pair[0] == "middle.weight"]
    second = [pair for pair in named if pair[0] in ("stem.weight", "middle.bias")]
    third = [pair for pair in named if pair[0].endswith("bias") and pair[0] != "middle.bias"]
    taken = [name for name, _ in (*first, *second, *third)]
    return [
        {"params": [pair for pair in named if pair[0] not in taken]},
        {"params": first, "precondition": False, "lr": 2e-2},
        {"params": second, "split_rows": (2,), "statistics_interval": 3},
        {"params": third, "weight_decay": 0.0},
    ]


def start(stage: int, groups: list[dict[str, Any]] | None, made: Any = None) -> Any:
    params = SOAP if groups is None else {**SOAP, "groups": groups}
    config = zero.configuration(f"zero{stage}", optimizer={"type": "Shampoo4", "params": params})
    replay = zero.Replay(hosts.make_model("mlp"))
    return zero.start(replay, config, groups=made and made(list(replay.named_parameters())))


def run(stage: int, groups: list[dict[str, Any]] | None, made: Any = None) -> tuple[dict[str, Tensor], str]:
    engine = start(stage, groups, made)
    for step in range(STEPS):
        zero.step(engine, hosts.make_gradients("mlp", step))
    found = zero.full_parameters(engine), engine.basic_optimizer.describe()
    engine.destroy()
    return found


def by_decay(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups of the program, which patterns cut further; all options of it are those of the configuration too."""
    return [{"params": [p for _, p in named if p.dim() > 1]}, {"params": [p for _, p in named if p.dim() <= 1]}]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "midle", "bits": 4}, "'midle' matches no parameter"),
    ({"pattern": "middle.weight", "bits": 4}, "'middle.weight' matches only parameters that earlier patterns match"),
    ({"pattern": "(", "bits": 4}, r"'(' is no regular expression"),
    ({"bits": 4}, 'each needs a "pattern"'),
    ({"pattern": "stem", "bit": 4}, "unknown option 'bit'"),
    ({"pattern": "stem", "colour": "red"}, "unknown option 'colour'"),
    ({"pattern": "stem", "bits": 5}, "bits must be one of"),
]


def on_ranks(rank: int) -> dict[str, Any]:
    zero.prepare()
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"patterns {stage}"] = run(stage, PATTERNS)
        found[f"groups {stage}"] = run(stage, None, groups_by_hand)
        found[f"both {stage}"] = run(stage, PATTERNS, by_decay)
        found[f"neither {stage}"] = run(stage, None)
    found["mistakes"] = [hosts.said(lambda wrong=wrong: start(2, [PATTERNS[0], wrong])) for wrong, _ in MISTAKES]
    return found


def results() -> list[dict[str, Any]]:
    return hosts.run_ranks_once(2, on_ranks)


@pytest.mark.parametrize("stage", STAGES)
def test_patterns_are_param_groups(stage: int) -> None:
    for rank in results():
        weights, described = rank[f"patterns {stage}"]
        for way in ("groups", "both"):
            expected, table = rank[f"{way} {stage}"]
            assert all(torch.equal(weights[name], expected[name]) for name in expected), way
            assert sorted(described.splitlines()) == sorted(table.splitlines())
        assert any(not torch.equal(weights[name], value) for name, value in rank[f"neither {stage}"][0].items())
        assert "middle.weight  (101, 44)  no" in described


def test_mistakes_are_named() -> None:
    for rank in results():
        for (_, expected), said in zip(MISTAKES, rank["mistakes"], strict=True):
            assert expected in said
