"""Saves that are cut off: processes killed at whatever moment, and disks that are full."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from support import worlds as hosts
from support.training import Training

from sharded_shampoo4 import checkpoint

KILLS = 8


def save_until_killed(rank: int, folder: str, host: str, victim: int, seconds: float) -> None:
    """Train and save without end; one rank is killed, as if by ``kill -9``, some time after its second save."""
    training = Training(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = 0
        if (Path(folder) / checkpoint.MANIFEST).exists():
            training.load(folder)
            begin = saved_step(Path(folder))
        for count, step in enumerate(range(begin, begin + 10_000)):
            training.train(range(step, step + 1))
            training.save(folder)
            if count == 1 and rank == victim:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def saved_step(folder: Path) -> int:
    return int(checkpoint.read_manifest(folder)["parameters"]["stem.weight"]["factors"]["step"])


def loaded_step(folder: Path) -> int:
    """Load in one process, compare with a run without a stop, and give the step."""
    training = Training("none", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.load(folder)
    step = saved_step(folder)
    expected = Training("none").train(range(step))
    found = training.parameters()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize(("host", "world_size"), [("ddp", 1), ("fsdp2", 2)])
def test_a_kill_at_whatever_moment_leaves_a_checkpoint(host: str, world_size: int, tmp_path: Path) -> None:
    """Each run goes on from the one before; the steps never go back."""
    moments = random.Random(0)
    unfinished, last = 0, 0
    with hosts.one_thread():
        for kill in range(KILLS):
            with pytest.raises(hosts.RankError):
                seconds, victim = moments.uniform(0.0, 0.15), kill % world_size
                hosts.run_ranks(world_size, save_until_killed, str(tmp_path), host, victim, seconds)
            unfinished += len(list(tmp_path.glob("data-*"))) > 1 or len(list(tmp_path.glob("manifest.json.*"))) > 0
            step = loaded_step(tmp_path)
            assert step >= last + 2
            last = step
    print(f"{KILLS} kills survived on {world_size} ranks, {unfinished} in the middle of a save; {last} steps")


def test_a_cut_just_before_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window that random kills hardly ever hit."""

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with hosts.one_thread():
        training = Training("none")
        training.train(range(2))
        training.save(tmp_path)
        training.train(range(2, 4))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", cut)
            training.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == 4
        assert loaded_step(tmp_path) == 2
        training.save(tmp_path)
        assert loaded_step(tmp_path) == 4
        assert len(list(tmp_path.iterdir())) == 2


def save_on_a_full_disk(rank: int, folder: str) -> tuple[str, float]:
    training = Training("fsdp2")
    training.train(range(3))
    training.save(folder)
    training.train(range(3, 4))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    begun = time.monotonic()
    try:
        training.save(folder)
    except OSError as error:
        said = str(error)
    else:
        said = "nothing was raised"
    seconds = time.monotonic() - begun
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said, seconds


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_full_disk_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for said, seconds in hosts.run_ranks(2, save_on_a_full_disk, str(tmp_path)):
        assert "could not be written" in said and "File too large" in said, said
        assert seconds < 30
    with hosts.one_thread():
        assert loaded_step(tmp_path) == 3


def save_to_own_folder(rank: int, folder: str) -> tuple[str, list[str], list[str]]:
    """As ranks of two nodes do that share no storage; then to a folder that they share."""
    training, own = Training("fsdp2"), Path(folder) / f"node{rank}"
    said = hosts.said(lambda: training.save(own / "last"))
    left = [path.name for path in (own / "last").iterdir()]
    training.save(Path(folder) / "shared")
    (data,) = (Path(folder) / "shared").glob("data-*")
    return said, left, [path.name for path in data.iterdir()]


def test_ranks_that_share_no_storage(tmp_path: Path) -> None:
    for said, left, written in hosts.run_ranks(2, save_to_own_folder, str(tmp_path)):
        place = tmp_path / "node0" / "last"
        assert "rank(s) 1 do not see" in said and "of rank 0: save to storage that all nodes share" in said
        assert said.startswith("OSError: ") and str(place) in said and not left
        assert sorted(written) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
