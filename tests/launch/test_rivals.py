"""The fair comparison of compare.py, on a task of a moment: searched learning rates, stored runs, table and picture."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import launching  # noqa: F401  finds launch/
from torch import Tensor, nn

# isort: split
from rivals import contest, widths
from rivals.optimizers import RIVALS, state_bytes
from rivals.tasks import TASKS, Batch, Task

from sharded_shampoo4 import Shampoo4


def batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    while True:
        inputs = torch.randn(16, 8, generator=generator)
        yield inputs, inputs @ truth


def make_model(seed: int, hidden: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, hidden), nn.Linear(hidden, 4))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


TINY = Task(
    "tiny", "two layers", 24, 0.0, 0.95, 4e-3, "validation loss", lambda done: 1 - done, 16, make_model, batches, loss,
    lambda model: {"validation loss": loss(model, next(batches(99))).item()},
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in RIVALS if not name.startswith("soap")]
)  # a package that may be missing
def test_the_best_rate_is_better_than_its_neighbors_and_runs_are_made_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    with ThreadPoolExecutor(1) as pool:
        lr, results = contest.Contest(TINY, tmp_path, pool).results(name, [0, 1])
    stored = {path.name: json.loads(path.read_text()) for path in (tmp_path / "tiny").iterdir()}
    searched = {float(key.split("-")[-3]): run["validation loss"] for key, run in stored.items() if "-8steps" in key}
    assert min(searched, key=searched.__getitem__) == lr
    assert all(near in searched for near in (lr / 2, lr * 2) if 5e-4 <= near <= 3.2e-2)
    assert [len(run["losses"]) for run in results] == [24, 24] and results[0]["losses"] != results[1]["losses"]
    monkeypatch.setattr(contest, "run", lambda *_: pytest.fail("a run was made again"))
    with ThreadPoolExecutor(1) as pool:
        assert contest.Contest(TINY, tmp_path, pool).results(name, [0, 1]) == (lr, results)


@pytest.mark.slow
def test_workers_are_processes(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        first, second = contest.Contest(TASKS["gpt"], tmp_path, pool).train("shampoo4", [1e-3], [0, 1], 2)
    assert first["losses"] != second["losses"] and len(first["losses"]) == len(second["losses"]) == 2
    assert len(list((tmp_path / "gpt").glob("shampoo4-0.001-seed*-2steps.json"))) == 2


def test_a_run_that_diverges_is_the_worst(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model, batch) * torch.nan

    found = contest.run(dataclasses.replace(TINY, loss=broken), RIVALS["adamw"], 1e-3, 0, 5)
    assert found["validation loss"] == math.inf and len(found["losses"]) == 1


def test_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    contest.compare(["adamw", "shampoo4"], ["tiny"], [0, 1], tmp_path)
    printed = capsys.readouterr().out
    assert "AdamW" in printed and "Shampoo4" in printed and "validation loss" in printed
    assert (tmp_path / "rivals.png").stat().st_size > 10_000


def test_every_width_has_its_own_best_rate_with_others_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    found = widths.compare_widths(["tiny"], [8, 16], 24, [0], tmp_path)["tiny"]
    assert list(found) == [(name, hidden) for name in widths.NAMES for hidden in (8, 16)]
    for losses in found.values():
        place = min(losses, key=losses.__getitem__)
        assert all(place * near in losses for near in (0.25, 0.5, 2, 4))
    for hidden, parameters in ((8, 8 * 8 + 8 + 8 * 4 + 4), (16, 8 * 16 + 16 + 16 * 4 + 4)):
        run = json.loads(next((tmp_path / f"hidden{hidden}" / "tiny").iterdir()).read_text())
        assert run["parameters"] == parameters and len(run["losses"]) == 24
    assert capsys.readouterr().out.count("*") == 6


def test_heads_keep_their_size_at_every_width() -> None:
    for task in (TASKS["vit"], TASKS["gpt"]):
        for hidden in (64, task.hidden_size, 256):
            config = task.make_model(0, hidden).config
            assert config.hidden_size == hidden and config.hidden_size // config.num_attention_heads == 32
            shown = config.intermediate_size / hidden
            assert shown == pytest.approx({"vit": 2, "gpt": 8 / 3}[task.name], rel=0.01)


def test_state_bytes_are_those_of_all_optimizers() -> None:
    for name, most in (("adamw", 9), ("muon", 9), ("shampoo4", 30)):
        model = make_model(0)
        optimizers = RIVALS[name].make(model, TINY)
        loss(model, next(batches(0))).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert 3 < state_bytes(optimizers) / sum(p.numel() for p in model.parameters()) < most


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_shampoo4_preconditions_every_matrix_of_the_tasks(task: Task) -> None:
    """Also the first convolution of gray images, whose shape is that of a depthwise one."""
    model = task.make_model(0, task.hidden_size)
    lines = {line.split()[0]: line for line in Shampoo4(model.named_parameters()).describe().splitlines() if line}
    matrices = [name for name, p in model.named_parameters() if sum(size > 1 for size in p.shape) > 1]
    left_out = [name for name in matrices if "yes: soap" not in lines[name]]
    assert matrices and not left_out


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_title_tells_the_number_of_parameters(task: Task) -> None:
    millions = task.title.split(" M parameters")[0].split()[-1]
    count = sum(parameter.numel() for parameter in task.make_model(0, task.hidden_size).parameters())
    assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions
