"""Figures of `benchmark.py scale`: against arithmetic, estimates, and steps of a rank whose peers are not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.launching import LAUNCH
from support.meta_steps import FakeRanks, count_step
from torch import Tensor

# isort: split
import benchmark  # found through launching
from bench.scale import simulate, worlds
from memory.models import shapes_of
from memory.rules import Layout

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.comm.ranks import Ranks
from sharded_shampoo4.options import PreconditionerOptions
from sharded_shampoo4.planning.copies import Copies
from sharded_shampoo4.presets import apply_preset

assert Path(benchmark.__file__).parent == LAUNCH

MODEL = "vit-digits"
FIRST_STEPS = {"soap": (1, {}), "shampoo": (2, {"statistics_interval": 2, "root_interval": 2})}  # before ordinary ones


def test_a_run_writes_a_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--models", MODEL, "--world_sizes", "1", "2", "4", "--node_size", "2", "--trace_memory")
    benchmark.main(["scale", *flags, "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"{MODEL}, 201,000 parameters, soap" in text and "hsdp 2x2" in text
    (found,) = json.loads((tmp_path / "scale.json").read_text())["models"]
    rows = {(row["host"], row["ranks"]): row for row in found["worlds"]}
    assert list(rows) == [("none", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)]

    shapes = shapes_of(MODEL)
    elements = sum(shape.numel() for shape in shapes.values() if sum(size > 1 for size in shape) > 1)
    alone = rows.pop(("none", 1))
    assert alone["sent_bytes"] == {"mean": 0, "most": 0} and not any(alone["collectives"].values())
    for ranks in (2, 4):  # every direction goes from its owner to all others
        found = rows["ddp", ranks]["sent_bytes"]["mean"] / (4 * elements * (ranks - 1) / ranks)
        assert 1 <= found < 2, "filled up to the longest of a round; there are few, and a block is a third of the model"
        assert rows["ddp", ranks]["most_receivers"] == 0
    for (host, ranks), row in rows.items():
        estimate = estimate_memory(shapes, ranks, host=host, replicas=row["replicas"])
        assert row["sent_bytes"]["most"] == max(estimate.traffic) > 0
        assert row["state_bytes"] == max(estimate.total)
        each_way = 0 if host == "ddp" else row["rounds"]
        shared = 0 if host == "fsdp2" else row["rounds"]
        assert row["collectives"] == {"all_to_all": 2 * each_way, "all_gather": shared, "all_reduce": 0, "on_host": 2}
        assert 1 <= row["balance"] <= ranks and 0 <= row["rank"] < ranks
        assert row["planning_bytes"] > 0 < row["plan_seconds"]


@pytest.mark.parametrize("method", FIRST_STEPS)
def test_a_step_of_the_rank_is_as_computed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, intervals = FIRST_STEPS[method]
    shapes, ranks = shapes_of(MODEL), 3
    row = simulate(shapes, Layout("fsdp2", ranks), PreconditionerOptions.of_call(apply_preset({"method": method})))
    assert row["planning_bytes"] is None

    start, messages = Ranks.start_all_to_all, []

    def noted(self: Ranks, receive: Tensor, send: Tensor, sizes: list[int], sent: list[int]) -> Any:
        messages.append((send.nbytes, receive.nbytes, sum(size > 0 for size in sent)))
        return start(self, receive, send, sizes, sent)

    monkeypatch.setattr(Ranks, "start_all_to_all", noted)
    run, pieces = Copies.run, []

    def counted(self: Copies, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        pieces.append(len(self))
        run(self, sources, targets)

    monkeypatch.setattr(Copies, "run", counted)
    with FakeRanks(row["rank"], ranks, {name: tuple(shape) for name, shape in shapes.items()}) as fake:
        parameters = fake.parameters()
        optimizer = Shampoo4(parameters.items(), foreach=True, method=method, **intervals)
        count_step(optimizer, parameters.values(), answer=1)
        for _ in range(first - 1):
            count_step(optimizer, parameters.values())
        messages.clear()
        pieces.clear()
        counts = count_step(optimizer, parameters.values())

    assert row["collectives"] == {
        "all_to_all": counts.collectives["alltoall_base_"],
        "all_gather": 0,
        "all_reduce": counts.collectives["allreduce_"],
        "on_host": counts.host_collectives["send"] // 2,  # log2(3) messages each
    }
    assert counts.collectives.total() == row["collectives"]["all_to_all"] + (method == "shampoo")
    assert row["pieces"] == sum(pieces) > 0
    sent, received, receivers = (max(values) for values in zip(*messages, strict=True))
    assert row["largest_message_bytes"] == {"sent": sent, "received": received}
    assert row["most_receivers"] == receivers
    traffic = estimate_memory(shapes, ranks, method=method).traffic
    assert counts.sent["alltoall_base_"] == traffic[row["rank"]] <= row["sent_bytes"]["most"]


def test_hsdp_needs_several_nodes() -> None:
    found = worlds([1, 8, 12, 1024], ["hsdp", "ddp"], 8)
    assert found == [Layout("none", 1), Layout("hsdp", 1024, 128), *(Layout("ddp", ranks) for ranks in (8, 12, 1024))]
