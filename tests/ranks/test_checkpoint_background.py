"""async_save: writing while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.training import FIRST, THEN, Training

from sharded_shampoo4 import checkpoint


def save_in_the_background(rank: int, folder: str) -> list[bool]:
    """Two saves while training goes on, and one that fails; each has what there was when it was begun."""
    zero.prepare()
    as_expected = []
    for host in ("ddp", "fsdp2", "zero2", "zero3"):
        training = Training(host, kind="vit")
        first = training.train(FIRST)
        pending = checkpoint.async_save(training.handle, f"{folder}/{host}", model=training.model)
        then = training.train(THEN)
        later = checkpoint.async_save(training.handle, f"{folder}/{host} then", model=training.model)
        training.train(range(10, 12))
        pending.result()
        later.result()
        for expected, name in ((first, host), (then, f"{host} then")):
            other = Training(host, seed=1, kind="vit")
            other.load(f"{folder}/{name}")
            loaded = other.parameters()
            as_expected.append(all(torch.equal(loaded[key], expected[key]) for key in expected))
            other.end()
        training.end()
    return as_expected


def test_saves_in_the_background_have_what_there_was_when_they_began(tmp_path: Path) -> None:
    for as_expected in hosts.run_ranks(2, save_in_the_background, str(tmp_path)):
        assert as_expected == [True] * 8


def test_an_error_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training("none")
    training.train(FIRST)
    training.save(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sharded_shampoo4.checkpoint.files.write_manifest", full)
        pending = checkpoint.async_save(training.optimizer, tmp_path)
        with pytest.raises(OSError, match="No space left"):
            pending.result()
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left of it
    Training("none").load(tmp_path)
    checkpoint.async_save(training.optimizer, tmp_path, model=training.model)
    training.save(tmp_path)  # waits for the one before
    assert len(list(tmp_path.iterdir())) == 2
