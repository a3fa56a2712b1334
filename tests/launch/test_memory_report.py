"""The memory report: published models, rules that real optimizers confirm, and bytes that ranks really hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import launching, worlds, zero_worlds
from torch import Size, Tensor
from torch.distributed.tensor import DTensor

# isort: split
import memory_report  # found through launching
from bench.blocks import blocks_of, orders_of
from bench.measure import state_bytes
from bench.scale import MODELS
from memory import models, rules
from memory.rules import Layout

from sharded_shampoo4 import Shampoo4, estimate_memory

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
    "llama-7b": (6_738_415_616, 0),
    "llama-8b": (8_030_261_248, 0),
}
SPREAD = (
    Layout("none", 1), Layout("ddp", 3), Layout("fsdp2", 3), Layout("hsdp", 4, 2), Layout("zero0", 3),
    Layout("zero1", 3), Layout("zero2", 3), Layout("zero3", 3),
)  # fmt: skip
MIXED = {"square": Size((64, 64)), "odd": Size((63, 65)), "long": Size((100, 41)), "bias": Size((7,))}


@pytest.fixture(scope="module")
def swin() -> models.Shapes:
    """Matrices of many shapes, tables and biases; uneven shards on three ranks."""
    return models.shapes_of("swin-tiny")


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    count, tolerance = PUBLISHED[name]
    assert models.parameter_count(models.shapes_of(name)) == pytest.approx(count, rel=tolerance, abs=0)


def test_every_reported_model_has_a_published_count() -> None:
    assert {*memory_report.REPORTED, *models.VITS, *MODELS, "llama-8b"} == set(PUBLISHED)


# -- rules, against real optimizers and by hand ------------------------------------------------------------------------


def step(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states after a step on gradients of ones."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return state_bytes(optimizer.state, parameters)


def test_adamw_and_muon_keep_what_torchs_do() -> None:
    parameters = dict(models.build("vit-digits").named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    hidden = [p for name, p in parameters.items() if rules.takes_muon(name, p.shape)]
    others = [p for name, p in parameters.items() if not rules.takes_muon(name, p.shape)]
    assert len(hidden) == 4 * 6 and all(p.ndim == 2 for p in hidden)
    alone = Layout("none", 1)
    assert rules.state_bytes(shapes, alone, "adamw") == [step(torch.optim.AdamW(parameters.values()))]
    both = step(torch.optim.Muon(hidden)) + step(torch.optim.AdamW(others))
    assert rules.state_bytes(shapes, alone, "muon") == [both]


def test_what_muon_leaves_to_adamw() -> None:
    shapes = {name: shape for model in ("vit-small", "swin-tiny", "llama-8b") for name, shape in _shapes(model)}
    left = {
        name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2 and not rules.takes_muon(name, shape)
    }
    assert left == {"classifier", "relative_position_bias", "embed_tokens", "lm_head"}


def _shapes(model: str) -> Iterator[tuple[str, Size]]:
    yield from models.shapes_of(model).items()


def test_8_bit_adamw_by_hand() -> None:
    """Scales: 4 bytes for each begun 256 elements, for both moments. Fewer than 4096 elements: 8 bytes each."""

    def held(*layout: Any) -> list[int]:
        return rules.state_bytes(MIXED, Layout(*layout), "adamw8bit")

    books = 2 * 256 * 4
    whole = 2 * 4096 + 8 * 16 + 8 * 4095 + 2 * 4100 + 8 * 17 + 8 * 7 + books
    assert held("none", 1) == [whole]
    assert held("ddp", 2) == [whole] * 2
    assert held("fsdp2", 2) == [8 * (2048 + 32 * 65 + 2050 + 4), 8 * (2048 + 31 * 65 + 2050 + 3)]  # all are small
    part = (4096 + 4095 + 4100 + 7 + 2) // 2  # one tensor for each rank, padded to a multiple of 4
    assert held("zero2", 2) == [2 * part + 8 * 25 + books] * 2


def test_weights_and_gradients_by_hand() -> None:
    shapes = {"matrix": Size((10, 3)), "bias": Size((7,))}
    found = {
        layout.host: (rules.weight_bytes(shapes, layout), rules.gradient_bytes(shapes, layout))
        for layout in (
            Layout("none", 1), Layout("ddp", 4), Layout("fsdp2", 4), Layout("hsdp", 4, 2), Layout("zero0", 4),
            Layout("zero1", 4), Layout("zero2", 4), Layout("zero3", 4),
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
    shapes, alone = models.shapes_of("llama-8b"), Layout("none", 1)
    (packed,), (base,) = (rules.state_bytes(shapes, alone, name) for name in ("shampoo32_packed", "adamw"))
    assert (packed - base) / 2**30 == pytest.approx(59.9, abs=0.1)


# -- the library's own plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_rows_are_what_the_library_estimates(swin: models.Shapes, layout: Layout) -> None:
    def estimate(**options: Any) -> Any:
        return estimate_memory(swin, layout.world_size, host=layout.host, replicas=layout.replicas, **options)

    own = estimate()
    assert rules.state_bytes(swin, layout, "shampoo4") == own.total
    assert (
        rules.state_bytes(swin, layout, "shampoo32")
        == estimate(method="shampoo", bits=32, max_aspect=0, batch_dims=0).total
    )
    assert rules.state_bytes(swin, layout, "shampoo4_compact") == estimate(preset="compact").total
    assert rules.state_bytes(swin, layout, "adamw") == estimate(precondition=False).base
    found = rules.footprint(swin, layout)
    assert found.total("shampoo4") == found.weights + found.gradients + max(own.total)


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_triangles_are_spread_as_squares_are(swin: models.Shapes, layout: Layout) -> None:
    """A triangle is half of its square and half a row; all squares are there once."""
    squares = rules.shampoo(swin, layout, "shampoo32").preconditioner
    base = rules.state_bytes(swin, layout, "adamw")
    triangles = [held - own for held, own in zip(rules.packed(swin, layout), base, strict=True)]
    sides = list(orders_of(blocks_of(swin.values(), max_aspect=0, batch_dims=0)).elements())
    assert sum(squares) == sum(8 * side**2 + 8 for side in sides)
    assert sum(triangles) == pytest.approx(sum(4 * side * (side + 1) for side in sides), abs=len(squares))
    for triangle, square in zip(triangles, squares, strict=True):
        assert triangle == pytest.approx(square / 2, rel=0.02)


# -- measured ----------------------------------------------------------------------------------------------------------

HELD = (Layout("ddp", 2), Layout("fsdp2", 2), Layout("zero0", 2), Layout("zero2", 2), Layout("zero3", 2))


def held_on_a_rank(rank: int) -> list[tuple[int, int | None]]:
    """Bytes of weights and gradients under each layout; DeepSpeed has dropped its gradients after a step."""
    zero_worlds.prepare()
    return [_zero_held(layout) if layout.host.startswith("zero") else _torch_held(layout) for layout in HELD]


def _torch_held(layout: Layout) -> tuple[int, int]:
    model = worlds.wrap(worlds.make_model("mlp"), layout.host)
    worlds.train_step(model, worlds.make_batch("mlp"))
    parameters = worlds.named(model, layout.host).values()
    return storage_bytes(parameters), storage_bytes(p.grad for p in parameters if p.grad is not None)


def _zero_held(layout: Layout) -> tuple[int, None]:
    model = zero_worlds.Replay(worlds.make_model("mlp"))
    optimizer = Shampoo4(model.named_parameters())
    engine = zero_worlds.start(model, zero_worlds.configuration(layout.host), optimizer)
    zero_worlds.step(engine, worlds.make_gradients("mlp", 0))
    own = [p for group in optimizer.param_groups for p in group["params"]]
    held = storage_bytes([*own, *(getattr(p, "ds_tensor", p) for p in model.parameters())])
    engine.destroy()
    return held, None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory under ``tensors``, with its padding; what they share is counted once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


@pytest.mark.slow
def test_ranks_hold_the_weights_and_gradients_that_are_reported() -> None:
    shapes = {name: parameter.shape for name, parameter in worlds.make_model("mlp").named_parameters()}
    for held in worlds.run_ranks(2, held_on_a_rank):
        for layout, (weights, gradients) in zip(HELD, held, strict=True):
            assert weights == rules.weight_bytes(shapes, layout), layout
            assert gradients in (None, rules.gradient_bytes(shapes, layout)), layout


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_writes_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("1", "2", "3")
    memory_report.main(["--models", "vit-small", "--world_sizes", *sizes, "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert "22,050,664" in text and "hsdp, 2 copies" in text and "135.93 MB" in text and "50.35 MB" in text
    rows = json.loads((tmp_path / "memory.json").read_text())["vit-small"]["bytes"]
    hosts = [row["layout"]["host"] for row in rows]
    twice = [host for host in rules.HOSTS[1:] for _ in range(2)]
    twice.remove("hsdp")  # its two copies cannot be on three ranks
    assert hosts == ["none", *twice]
    estimate = estimate_memory(models.shapes_of("vit-small"), 3, host="fsdp2")
    (row,) = (row for row in rows if row["layout"] == {"host": "fsdp2", "world_size": 3, "replicas": None})
    assert row["states"]["shampoo4"] == max(estimate.total)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--largest", "8", "0"], "a positive number of GB, got 8 0"),
        (["--largest", "1.5", "24"], "a number of GPUs"),
        (["--world_sizes", "0"], "positive integers"),
        (["--models", "vit-unknown"], "invalid choice: 'vit-unknown'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory_report.main(flags)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 2, said


# -- the largest that fits ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ViT-S and ViT-B, which are quickly planned."""
    monkeypatch.setattr(memory_report, "VITS", models.VITS[:2])
    yield


@pytest.mark.usefixtures("small_family")
@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon", "shampoo4"])
@pytest.mark.parametrize("room", [0.03e9, 0.2e9, 0.4e9])
def test_the_largest_is_what_a_search_of_all_finds(optimizer: str, room: float) -> None:
    fitting = {}
    for name, layers in itertools.product(memory_report.VITS, range(1, 13)):
        shapes = models.shapes_of(name, layers)
        total = rules.footprint(shapes, Layout("fsdp2", 2), [optimizer]).total(optimizer)
        if total <= room:
            fitting[models.parameter_count(shapes)] = {"model": name, "layers": layers, "bytes": total}
    count = max(fitting)
    assert memory_report.largest(optimizer, 2, room) == {**fitting[count], "parameters": count}
    assert len(fitting) < 24


@pytest.mark.usefixtures("small_family")
def test_largest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_report.largest("adamw", 1, 10**6) == {}
    flags = ["--largest", "2", "0.5", "--largest", "1", "0.001"]
    memory_report.main([*flags, "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "the largest ViT on 2 GPUs of 0.5 GB, FSDP2" in said and "none" in said
    answers = json.loads((tmp_path / "largest.json").read_text())
    assert [answer["optimizer"] for answer in answers] == 2 * list(rules.OPTIMIZERS)
    assert all(0.25e9 < answer["bytes"] <= 0.5e9 for answer in answers[: len(rules.OPTIMIZERS)])
    assert all("bytes" not in answer for answer in answers[len(rules.OPTIMIZERS) :])
