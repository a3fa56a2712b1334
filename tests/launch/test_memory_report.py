"""The memory report: published models, rules that real optimizers confirm, and estimates that ranks confirm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory_largest
import memory_measure
import memory_models
import memory_report
import memory_rules as rules
import psutil
import pytest
import torch
from memory_rules import Layout, Planner
from support import launching  # makes launch/ importable
from torch import Size, nn

from sharded_shampoo4 import estimate_memory
from sharded_shampoo4.memory import tensor_bytes

assert Path(memory_report.__file__).parent == launching.LAUNCH

PUBLISHED = {  # parameters: exact where the same model is published, else as many digits as are
    "vit-small": (22_050_664, 0),
    "vit-base": (86_567_656, 0),
    "vit-large": (304_326_632, 0),
    "vit-huge": (632_045_800, 0),
    "vit-giant": (1.011e9, 2e-3),
    "vit-gigantic": (1.843e9, 2e-3),
    "vit-enormous": (3.926e9, 0.04),  # with its head of 29,593 classes and its pooling by attention
    "vit-22b": (21.743e9, 1e-3),
    "swin-tiny": (28_288_354, 0),
    "llama-1b": (1_235_814_400, 0),
    "llama-8b": (8_030_261_248, 0),
}
SPREAD = (
    Layout("none", 1), Layout("ddp", 3), Layout("fsdp2", 3), Layout("hsdp", 4, 2), Layout("zero0", 3),
    Layout("zero1", 3), Layout("zero2", 3), Layout("zero3", 3),
)  # fmt: skip
MIXED = {"square": Size((64, 64)), "odd": Size((63, 65)), "long": Size((100, 41)), "bias": Size((7,))}


@pytest.fixture(scope="module")
def swin() -> Planner:
    """Matrices of many shapes, tables and biases; uneven shards on three ranks."""
    return Planner(memory_models.shapes_of("swin-tiny"))


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    count, tolerance = PUBLISHED[name]
    assert memory_models.parameter_count(memory_models.shapes_of(name)) == pytest.approx(count, rel=tolerance, abs=0)


def test_every_reported_model_has_a_published_count() -> None:
    assert {*memory_report.REPORTED, *memory_models.LADDER} == set(PUBLISHED)


# -- rules, against real optimizers and by hand ------------------------------------------------------------------------


def step(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states after a step on gradients of ones."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return tensor_bytes(optimizer.state.values())


def test_adamw_and_muon_keep_what_torchs_do() -> None:
    parameters = dict(memory_models.build("vit-digits").named_parameters())
    planner = Planner({name: parameter.shape for name, parameter in parameters.items()})
    hidden = [p for name, p in parameters.items() if rules.takes_muon(name, p.shape)]
    others = [p for name, p in parameters.items() if not rules.takes_muon(name, p.shape)]
    assert len(hidden) == 4 * 6 and all(p.ndim == 2 for p in hidden)
    alone = Layout("none", 1)
    assert planner.states(alone, "adamw") == [step(torch.optim.AdamW(parameters.values()))]
    assert planner.states(alone, "muon") == [step(torch.optim.Muon(hidden)) + step(torch.optim.AdamW(others))]


def test_what_muon_leaves_to_adamw() -> None:
    shapes = {name: shape for model in ("vit-small", "swin-tiny", "llama-8b") for name, shape in _shapes(model)}
    left = {
        name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2 and not rules.takes_muon(name, shape)
    }
    assert left == {"classifier", "relative_position_bias", "embed_tokens", "lm_head"}


def _shapes(model: str) -> Iterator[tuple[str, Size]]:
    yield from memory_models.shapes_of(model).items()


def test_8_bit_adamw_by_hand() -> None:
    """Scales: 4 bytes for each begun 256 elements, for both moments. Fewer than 4096 elements: 8 bytes each."""
    planner = Planner(MIXED)
    books = 2 * 256 * 4
    whole = 2 * 4096 + 8 * 16 + 8 * 4095 + 2 * 4100 + 8 * 17 + 8 * 7 + books
    assert planner.states(Layout("none", 1), "adamw8bit") == [whole]
    assert planner.states(Layout("ddp", 2), "adamw8bit") == [whole] * 2
    halves = [8 * (2048 + 32 * 65 + 2050 + 4), 8 * (2048 + 31 * 65 + 2050 + 3)]  # all are small
    assert planner.states(Layout("fsdp2", 2), "adamw8bit") == halves
    part = (4096 + 4095 + 4100 + 7 + 2) // 2  # one tensor for each rank, padded to a multiple of 4
    assert planner.states(Layout("zero2", 2), "adamw8bit") == [2 * part + 8 * 25 + books] * 2


def test_weights_and_gradients_by_hand() -> None:
    planner = Planner({"matrix": Size((10, 3)), "bias": Size((7,))})
    found = {
        host: (planner.weights(Layout(host, size, replicas)), planner.gradients(Layout(host, size, replicas)))
        for host, size, replicas in (
            ("none", 1, None), ("ddp", 4, None), ("fsdp2", 4, None), ("hsdp", 4, 2), ("zero0", 4, None),
            ("zero1", 4, None), ("zero2", 4, None), ("zero3", 4, None),
        )
    }  # fmt: skip
    whole, rows, half = 4 * 37, 4 * (3 * 3 + 2), 4 * (5 * 3 + 4)
    padded, part = 4 * 40, 4 * 10  # 37 elements are padded to a multiple of 2 x 4
    assert found == {
        "none": (whole, whole),
        "ddp": (whole, whole),
        "fsdp2": (rows, rows),
        "hsdp": (half, half),
        "zero0": (whole, whole),
        "zero1": (padded + part, whole),
        "zero2": (padded + part, part),
        "zero3": (4 * (8 + 2), 4 * (8 + 2)),
    }


def test_packed_shampoo_is_metas() -> None:
    """Llama-3-8B's matrices in Meta's packed float32, blocks of 1024: 60.9 GiB less 1.0 for the norms."""
    planner = Planner(memory_models.shapes_of("llama-8b"))
    (packed,), (base,) = (planner.states(Layout("none", 1), name) for name in ("shampoo32_packed", "adamw"))
    assert (packed - base) / 2**30 == pytest.approx(59.9, abs=0.1)
    assert [rules.squares(3), rules.triangles(3)] == [2 * 4 * 9, 2 * 4 * 6]


# -- the library's planner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SPREAD, ids=lambda layout: layout.host)
def test_rows_are_what_the_library_estimates(swin: Planner, layout: Layout) -> None:
    def estimate(bits: int) -> Any:
        options: dict[str, Any] = {"host": layout.host, "replicas": layout.replicas, "bits": bits}
        return estimate_memory(swin.shapes, layout.world_size, **options)

    own, full = estimate(4), estimate(32)
    assert swin.states(layout, "shampoo4") == own.total
    assert swin.states(layout, "adamw") == own.base
    failures = [8 * sum(owned.values()) for owned in rules.owned_orders(swin.shapes, layout)]
    assert swin.states(layout, "shampoo32") == [a - b for a, b in zip(full.total, failures, strict=True)]
    footprint = swin.footprint(layout)
    assert footprint.total("shampoo4") == footprint.weights + footprint.gradients + max(own.total)


@pytest.mark.parametrize("layout", SPREAD, ids=lambda layout: layout.host)
def test_all_ranks_together_own_what_one_process_owns(swin: Planner, layout: Layout) -> None:
    def together(where: Layout) -> dict[str, int]:
        orders = rules.owned_orders(swin.shapes, where)
        return {name: sum(rules.factors(orders, price)) for name, price in rules.FACTOR_PRICES.items()}

    alone = together(Layout("none", 1))
    assert together(layout) == alone
    assert alone["shampoo32"] > 1.9 * alone["shampoo32_packed"] > 6 * alone["shampoo4"]


# -- measured ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_allocate_what_was_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = ("ddp", "fsdp2", "zero2", "zero3")
    flags = ("--measure", "--models", "vit-digits", "--world_sizes", "2", "--hosts", *hosts)
    memory_report.main([*flags, "--output_dir", str(tmp_path)])
    assert "estimate = measured on all 8 ranks" in capsys.readouterr().out
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [(row["host"], row["rank"]) for row in rows] == [(host, rank) for host in hosts for rank in range(2)]
    assert all(row["measured"] == row["estimated"] and row["measured"]["preconditioner"] > 0 for row in rows)
    weights = {row["host"]: row["measured"]["weights"] / (4 * 201_000) for row in rows}
    assert weights == {"ddp": 1, "fsdp2": pytest.approx(0.5, abs=0.01), "zero2": 1.5, "zero3": 0.5}


def test_a_mismatch_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = memory_measure.estimated("vit-digits", Layout("none", 1))
    monkeypatch.setattr(memory_measure, "measured", lambda *_: [[held[0]._replace(preconditioner=17)]])
    flags = ["--measure", "--models", "vit-digits", "--world_sizes", "1", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"differ:\nvit-digits under none, rank 0 of 1: .* != .*preconditioner=17"):
        memory_report.main(flags)


def test_too_little_memory_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 10**6

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    flags = ["--measure", "--models", "vit-digits", "--world_sizes", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"vit-digits under ddp on 2 processes needs about 2.0 GB"):
        memory_report.main(flags)


def test_shared_memory_is_counted_once() -> None:
    whole = torch.zeros(10)
    assert memory_measure.storage_bytes([whole[:3], whole[3:5], torch.zeros(2), nn.Parameter(whole)]) == 48


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_writes_tables_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("1", "2", "3")
    memory_report.main(["--models", "vit-small", "--world_sizes", *sizes, "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert "22,050,664" in text and "hsdp, 2 copies" in text and "235.24 MB" in text
    rows = json.loads((tmp_path / "memory.json").read_text())["vit-small"]["bytes"]
    hosts = [row["host"] for row in rows]
    twice = [host for host in rules.HOSTS[1:] for _ in range(2)]
    twice.remove("hsdp")  # its two copies cannot be on three ranks
    assert hosts == ["none", *twice]
    estimate = estimate_memory(memory_models.shapes_of("vit-small"), 3, host="fsdp2")
    (row,) = (row for row in rows if (row["host"], row["world_size"]) == ("fsdp2", 3))
    assert row["states"]["shampoo4"] == max(estimate.total)
    assert row["totals"]["muon"] == row["weights"] + row["gradients"] + row["states"]["muon"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--largest", "8", "24", "--reserve_gb", "24"], "GB above --reserve_gb, got 8 24"),
        (["--largest", "1.5", "24"], "a number of GPUs"),
        (["--world_sizes", "0"], "positive integers"),
        (["--models", "vit-unknown"], "invalid choice: 'vit-unknown'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory_report.main(flags)
    assert message in capsys.readouterr().err


# -- the largest that fits ---------------------------------------------------------------------------------------------


def test_the_family_grows_without_gaps() -> None:
    def count(name: str, layers: int) -> int:
        return memory_models.parameter_count(memory_models.shapes_of(name, layers))

    for smaller, larger in zip(memory_models.LADDER, memory_models.LADDER[1:], strict=False):
        published = count(smaller, memory_largest.published_depth(smaller))
        fewest = memory_largest.depths(larger)[0]
        assert count(larger, fewest) > published
        assert fewest == 1 or count(larger, fewest - 1) <= published


@pytest.fixture
def small_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ViT-S and ViT-B, which are quickly planned; the second with up to 48 layers."""
    memory_largest.depths.cache_clear()
    monkeypatch.setattr(memory_largest, "LADDER", memory_models.LADDER[:2])
    yield
    memory_largest.depths.cache_clear()


@pytest.mark.usefixtures("small_family")
@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon", "shampoo4"])
@pytest.mark.parametrize("room", [0.03e9, 0.2e9, 0.45e9])
def test_the_largest_is_what_a_search_of_all_finds(optimizer: str, room: float) -> None:
    gpus = 2
    family = [(name, layers) for name in memory_largest.LADDER for layers in memory_largest.depths(name)[:20]]
    fitting = [which for which in family if memory_largest.total_bytes(*which, optimizer, gpus) <= room]
    answer = memory_largest.largest(optimizer, gpus, room)
    assert answer is not None and (answer.name, answer.layers) == fitting[-1] != family[-1]
    assert answer.total == memory_largest.total_bytes(*fitting[-1], optimizer, gpus)
    published = [name for name, layers in fitting if layers == memory_largest.published_depth(name)]
    assert answer.published == (published[-1] if published else None)


@pytest.mark.usefixtures("small_family")
def test_the_ends_of_the_family() -> None:
    assert memory_largest.largest("adamw", 1, 10**6) is None
    answers = [memory_largest.largest("adamw", 1, room) for room in (1.3e9, 1.4e9, 2e9, 10**12)]
    assert list(map(str, answers)) == [
        "ViT-B/16, 11 of its 12 layers",
        "ViT-B/16",
        "ViT-B/16, 17 layers instead of 12",
        "ViT-B/16, 48 layers instead of 12, or larger",
    ]


@pytest.mark.usefixtures("small_family")
def test_largest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory_report.main(["--largest", "2", "1", "--reserve_gb", "0.5", "--output_dir", str(tmp_path)])
    assert "the largest ViT on 2 GPUs of 1 GB, 0.5 of them kept free" in capsys.readouterr().out
    answers = json.loads((tmp_path / "largest.json").read_text())
    assert [answer["optimizer"] for answer in answers] == list(rules.OPTIMIZERS)
    assert all(0.38e9 < answer["largest"]["total"] <= 0.5e9 for answer in answers)
