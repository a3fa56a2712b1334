"""A run of train_vit.py that resumes from another than its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import launching  # noqa: F401  finds launch/

# isort: split
from vit.progress import Checkpoints

pytestmark = pytest.mark.usefixtures("one_process")


def checkpoints(folder: Path, loaded: list[str], limit: int | None = None) -> Checkpoints:
    accelerator: Any = SimpleNamespace(
        is_main_process=True,
        wait_for_everyone=lambda: None,
        save_state=lambda place: Path(place).mkdir(),
        load_state=loaded.append,
    )
    return Checkpoints(accelerator, folder, limit, {"seed": 0})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_later_checkpoints_are_neither_found_nor_pruned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded: list[str] = []
    for step in (100, 200, 300):
        checkpoints(tmp_path, loaded).save(step)
    (tmp_path / "checkpoint-400").mkdir()  # never finished
    with caplog.at_level("WARNING", "train_vit"):
        checkpoints(tmp_path, loaded).begin(str(tmp_path / "checkpoint-200"), overwrite=False)
    kept = ["abandoned-checkpoint-300", "checkpoint-100", "checkpoint-200", "checkpoint-400"]
    assert names(tmp_path) == kept
    assert "checkpoint-300 is later than step 200" in caplog.text and "abandoned-checkpoint-300" in caplog.text

    checkpoints(tmp_path, loaded, limit=1).save(250)
    assert names(tmp_path) == ["abandoned-checkpoint-300", "checkpoint-250"], "the limit is 1"
    checkpoints(tmp_path, loaded).begin("latest", overwrite=False)
    assert loaded == [str(tmp_path / f"checkpoint-{step}") for step in (200, 250)]


def test_one_that_was_abandoned_before_is_replaced(tmp_path: Path) -> None:
    for text in ("first", "second"):
        checkpoints(tmp_path, []).save(1)
        checkpoints(tmp_path, []).save(2)
        (tmp_path / "checkpoint-2" / "text").write_text(text)
        checkpoints(tmp_path, []).begin(str(tmp_path / "checkpoint-1"), overwrite=False)
    assert names(tmp_path) == ["abandoned-checkpoint-2", "checkpoint-1"]
    assert (tmp_path / "abandoned-checkpoint-2" / "text").read_text() == "second"
