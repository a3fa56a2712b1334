"""How cost grows, and what the exchange hides: the model's counts, and tiny runs of both scripts."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import LAUNCH, run_really
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# isort: split
import bench_growth
import timeline
import timeline_record
from growth_model import Work, busiest, owned_blocks, squares, stack, stack_shapes, work_of

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.layout import Block
from sharded_shampoo4.options import PreconditionerOptions

assert Path(bench_growth.__file__).parent == LAUNCH

# -- the model ---------------------------------------------------------------------------------------------------------

RAGGED = {"wide": (70, 150), "square": (128, 128), "small": (20, 65), "kernel": (6, 4, 5), "bias": (9,)}


@pytest.mark.parametrize(
    "options", [{}, {"rectify_steps": (2, 3), "refresh_iterations": 2}, {"bits": 32}], ids=["defaults", "more", "32"]
)
def test_flops_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    options = {"max_preconditioner_dim": 80, "statistics_interval": 2, "root_interval": 2, **options}
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in RAGGED.values()]
    optimizer = Shampoo4(parameters, **options)
    counted = []
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        counted.append(counter.get_total_flops())
    (blocks,) = owned_blocks(RAGGED, 1, PreconditionerOptions(**options))
    assert len(blocks) == 2 + 4 + 1 + 1
    work = work_of(blocks, PreconditionerOptions(**options))
    assert counted == [0, work.ordinary + work.products, work.ordinary, work.ordinary + work.products]


def test_work_of_a_block_by_hand() -> None:
    rows, columns = 100, 50  # 2500 elements: the right factor stays in float32
    work = work_of([Block(0, 0, rows, columns)], PreconditionerOptions())
    product = 2 * rows**2 * columns + 2 * rows * columns**2
    bjorck_average_quotient_root = 4 * (1 + 4) + 4 + 2 + 2
    assert work == Work(
        ordinary=product,
        decoded=100 * 50 + 100 * 2 * 4 + 100 * 4 + 4 * 100**2,
        products=product + bjorck_average_quotient_root * rows**3 + 2 * columns**3,
        factorisations=8 / 3 * rows**3 + 9 * columns**3,
    )
    assert work.refresh == work.products + work.factorisations
    one = work_of([Block(0, 0, 256, 256)], PreconditionerOptions())
    assert one.ordinary == 4 * 256**3 and one.refresh == pytest.approx((60 + 16 / 3) * 256**3)


def test_ranks_share_the_work() -> None:
    options = PreconditionerOptions()
    shapes = stack_shapes(64, 2)
    alone = busiest(shapes, 1, options)
    ranks = [work_of(blocks, options) for blocks in owned_blocks(shapes, 3, options)]
    assert tuple(map(sum, zip(*ranks, strict=True))) == pytest.approx(tuple(alone))
    assert alone.refresh / 3 <= busiest(shapes, 3, options).refresh < alone.refresh / 2
    assert busiest(squares(8, 16), 4, options).ordinary * 4 == busiest(squares(8, 16), 1, options).ordinary


def test_stacks_have_the_parameters_that_were_asked_for() -> None:
    for wanted in (1e6, 3e6, 1e7, 3e7, 1e8):
        hidden, layers = stack(wanted)
        assert sum(map(math.prod, stack_shapes(hidden, layers).values())) == pytest.approx(wanted, rel=0.12)
        assert 50 <= hidden / layers <= 100
    assert stack(1) == (64, 1)


def test_constants_are_fitted_and_applied() -> None:
    def row(x: int, ordinary: float, refresh: float) -> dict[str, Any]:
        return {"flops": {"ordinary": x, "refresh": 10 * x}, "seconds": {"ordinary": ordinary, "refresh": refresh}}

    rows = [row(1, 3.0, 5.0), row(9, 17.0, 115.0)]
    constants = bench_growth.fit(rows)
    assert constants == {"ordinary": 20 / 10, "refresh": 100 / 100}
    bench_growth.predict(rows[1], constants)
    assert rows[1]["predicted"] == {"ordinary": 18.0, "refresh": 18.0 + 90.0}
    assert rows[1]["ratio"] == {"ordinary": 17 / 18, "refresh": 115 / 108}


def test_the_busiest_rank_counts() -> None:
    def rank(processor: tuple[float, ...], elapsed: float) -> bench_growth.Measured:
        steps = [bench_growth.Times(elapsed, seconds) for seconds in processor]
        return bench_growth.Measured({kind: steps for kind in bench_growth.KINDS}, [])

    found = bench_growth.median([rank((1, 9, 2), 3), rank((4, 1, 2), 2)], torch.device("cpu"))
    assert found["seconds"]["refresh"] == 4 and found["elapsed"]["adamw"] == 3
    assert bench_growth.median([rank((1, 1, 1), 3)], torch.device("cuda"))["seconds"]["ordinary"] == 3


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_growth_is_measured(tmp_path: Path) -> None:
    flags = ("--parameters", "5e4", "2e5", "--world_sizes", 1, 2, "--matrices", 2, "--order", 64, "--rounds", 1)
    blocks = ("--block_order", 64, "--block_sizes", 32, 64)
    script = LAUNCH / "bench_growth.py"
    ended = run_really(sys.executable, script, *flags, *blocks, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert all(f"Against {what}" in ended.stdout for what in ("parameters", "ranks", "the order of blocks"))
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [row["x"] for row in found["parameters"]] == [12 * 64**2, 12 * 128**2]
    assert [row["x"] for row in found["ranks"]] == [1, 2] and [row["block_count"] for row in found["blocks"]] == [4, 1]
    rows = [row for name in bench_growth.TABLES for row in found[name]]
    for row in rows:
        assert min(row["seconds"][kind] for kind in bench_growth.KINDS) > 0
        for kind in ("ordinary", "refresh"):
            assert row["ratio"][kind] == pytest.approx(row["seconds"][kind] / row["predicted"][kind])
        assert {kind: len(steps) for kind, steps in row["steps"][0].items()} == {
            "ordinary": 1,
            "refresh": 1,
            "adamw": 2,
        }
    assert all(row["seconds"]["refresh"] > 2 * row["seconds"]["ordinary"] for row in found["parameters"])
    alone, spread = found["ranks"]
    assert alone["flops"]["refresh"] == 2 * spread["flops"]["refresh"]
    estimate = estimate_memory(squares(2, 64), 2, host="ddp").traffic
    assert (alone["sent"], spread["sent"]) == (alone["traffic_bytes"], spread["traffic_bytes"]) == (0, max(estimate))
    assert spread["sent"] == 4 * 64 * 64  # the direction of its matrix
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["fsdp2", "ddp"])
def test_the_exchange_overlaps_computing(host: str, tmp_path: Path) -> None:
    flags = ("--hidden_size", 64, "--layers", 2, "--batch_size", 2, "--scratch_mib", 1, "--accumulate", 3)
    script = LAUNCH / "timeline.py"
    ended = run_really(sys.executable, script, "--host", host, *flags, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "timeline.json").read_text())
    assert found["host"] == host and min(found["estimated_bytes"]) > 0
    for kind in ("ordinary", "refresh"):
        assert f"{host}, 2 ranks, {kind} step" in ended.stdout
        longest = max(summary["step_ms"] for summary in found[kind])
        for rank, summary in enumerate(found[kind]):
            for batch in summary["batches"]:
                bar = timeline.bar(batch, longest, 60)
                assert f"rank {rank}  {timeline.line(batch)}  |{bar}|\n" in ended.stdout
            assert f"rank {rank}  {timeline.told(timeline_record.totals(summary))}\n" in ended.stdout
            assert_ordered(summary)
            assert summary["sent_by_micro_step"] == [0, 0, found["estimated_bytes"][rank]]
            events = json.loads((tmp_path / f"{kind}-rank{rank}.json").read_text())["traceEvents"]
            names = {event["name"] for event in events}
            assert {"shampoo4: send gradients of batch 1", "shampoo4: send directions of batch 0"} <= names
            computed = sum(name.startswith("shampoo4: compute batch") for name in names)
            assert computed == sum(bool(batch["computed"]) for batch in summary["batches"]) > 1
    assert ended.stdout.count("nothing in 2 of 3") == 4


def assert_ordered(summary: dict[str, Any]) -> None:
    """Parts follow one another, and while a batch is computed its neighbours' pieces are under way."""
    batches = summary["batches"]
    assert [batch["batch"] for batch in batches] == list(range(len(batches))) and len(batches) > 2
    for batch in batches:
        gradients, directions = batch["gradients"], batch["directions"]
        posted, done = directions["under_way"]
        assert 0 < gradients["under_way"][0] <= gradients["under_way"][1] <= gradients["waited"][1]
        begin, end = batch["computed"] or (gradients["waited"][1], posted)
        assert gradients["waited"][1] <= begin <= end <= posted <= done <= directions["waited"][1]
        assert directions["waited"][1] <= batch["written"] <= summary["step_ms"]
    for batch, following in pairwise(batches):
        if batch["computed"]:
            assert following["gradients"]["under_way"][0] <= batch["computed"][0]
        if following["computed"]:
            assert batch["directions"]["under_way"][0] <= following["computed"][0]
            assert batch["directions"]["waited"][0] >= following["computed"][1]


# -- the summary of a timeline -----------------------------------------------------------------------------------------


def way(posted: float, done: float, waited: float) -> dict[str, Any]:
    return {"under_way": [posted, done], "waited": [waited, max(waited, done)]}


def test_totals_by_hand() -> None:
    first = {"gradients": way(0, 2, 1), "computed": [2, 10], "directions": way(11, 15, 20), "written": 21}
    second = {"gradients": way(1, 5, 12), "computed": [12, 20], "directions": way(21, 22, 21), "written": 23}
    summary = {"step_ms": 25, "batches": [{"batch": 0, **first}, {"batch": 1, **second}]}
    assert timeline_record.totals(summary) == {
        "step_ms": 25,
        "computing_ms": 8 + 8,
        "waiting_ms": 1 + 0 + 0 + 1,
        "transfer_ms": 2 + 4 + 4 + 1,
        "overlapped_share": (0 + 3 + 3 + 0) / 11,
        "transfers": 4,
        "in_time": 2,
    }
    assert timeline_record.overlap((1, 4), [(0, 2), (3, 9)]) == 2
    assert timeline_record.overlap((4, 5), [(0, 4), (5, 9)]) == 0


def test_bars() -> None:
    batch = {
        "batch": 3,
        "gradients": way(0, 19, 5),
        "computed": [20, 59],
        "directions": way(80, 100, 90),
        "written": 95,
    }
    assert timeline.bar(batch, 100, 10) == "gg####  dd"
    assert timeline.bar({**batch, "computed": None}, 100, 10) == "gg      dd"
    assert "computed not here" in timeline.line({**batch, "computed": None})
    assert "gradients 0.0-19.0" in timeline.line(batch)
    assert timeline.sent_text([0, 0, 1024]) == "0 B, 0 B, 1.0 KiB in its micro-steps: nothing in 2 of 3"


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (bench_growth, ["--rounds", "0"], "must be at least 1"),
        (bench_growth, ["--only", "weather"], "invalid choice: 'weather'"),
        (timeline, ["--hidden_size", "48"], "--hidden_size takes multiples of 32, got 48"),
        (timeline, ["--accumulate", "0"], "must be positive"),
        (timeline, ["--world_size", "1"], "one by itself sends nothing"),
    ],
)
def test_wrong_flags(script: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(flags)
    assert message in capsys.readouterr().err
