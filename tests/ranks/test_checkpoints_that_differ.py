"""Ranks that save or load different things, saves that fail, and tensors that no checkpoint can hold."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import worlds as hosts
from support import zero_worlds as zero
from support.training import Training
from support.worlds import said
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.checkpoint import files

FILES = [".metadata", "__0_0.distcp", "__1_0.distcp"]  # that two ranks write

# -- ranks that load different states ----------------------------------------------------------------------------------


def load_differently(rank: int, host: str, folder: str) -> dict[str, Any]:
    """Load checkpoints of different steps, a file that all ranks share, and copies of it, of which one is damaged."""
    training, shared = Training(host), Path(folder) / "first"
    training.train(range(2))
    training.save(shared)
    training.train(range(2, 4))
    training.save(Path(folder) / "second")
    before, told = training.parameters(), dict[str, Any]()
    told["different"] = said(lambda: training.load(Path(folder) / ("second" if rank else "first")))
    told["missing"] = said(lambda: training.load(Path(folder) / ("none" if rank else "first")))

    def load(place: Path) -> tuple[str, list[str]]:
        """What is raised, and the files that this rank has checked."""
        with mock.patch.object(files, "file_checksum", side_effect=files.file_checksum) as spy:
            return said(lambda: training.load(place)), [call.args[0].name for call in spy.call_args_list]

    own = Path(folder) / f"node{rank}"
    shutil.copytree(shared, own)
    if rank == 1:
        path = next(own.glob("data-*/__1_0.distcp"))  # one that rank 0 checks where the files are shared
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    told["damaged"], _ = load(own)
    after = training.parameters()
    told["unchanged"] = all(torch.equal(after[name], before[name]) for name in before)
    told["shared"] = load(shared)
    shutil.rmtree(own)
    shutil.copytree(shared, own)
    told["copies"] = load(own)
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_ranks_load_one_checkpoint_and_check_every_copy_of_it(host: str, tmp_path: Path) -> None:
    told = hosts.run_ranks(2, load_differently, host, str(tmp_path))
    for found in told:
        assert found["different"].startswith("ValueError: ranks load different checkpoints")
        for rank, name in enumerate(("first", "second")):
            data = checkpoint.read_manifest(tmp_path / name)["data"]
            assert f"rank {rank} has {tmp_path / name / data}" in found["different"]
        assert "none has no complete checkpoint" in found["missing"]
        assert "__1_0.distcp is damaged" in found["damaged"] and str(tmp_path / "node1") in found["damaged"]
        assert found["unchanged"]
        assert found["shared"][0] == found["copies"][0] == "nothing was raised"
        assert sorted(found["copies"][1]) == FILES
    assert sorted(name for found in told for name in found["shared"][1]) == FILES


def load_states_differently(rank: int, host: str) -> tuple[str, str]:
    """Attach the states of two steps; then, on every rank, those of one."""
    if host.startswith("zero"):
        zero.prepare()
    training = Training(host)
    states = []
    for steps in (range(2), range(2, 4)):
        training.train(steps)
        if host == "ddp":
            training.optimizer.consolidate_state_dict()
        states.append(copy.deepcopy(training.optimizer.state_dict()))
    training.optimizer.load_state_dict(states[rank >= dist.get_world_size() // 2])
    different = said(lambda: training.train(range(4, 5)))
    training.optimizer.load_state_dict(states[0])
    same = said(lambda: training.train(range(4, 5)))
    training.end()
    return different, same


@pytest.mark.parametrize(("host", "world_size"), [("ddp", 2), ("hsdp", 4), ("zero2", 2)])
def test_states_of_different_steps_are_not_attached(host: str, world_size: int) -> None:
    for different, same in hosts.run_ranks(world_size, load_states_differently, host, timeout=60):
        assert different.startswith("ValueError: the ranks have loaded preconditioners of "), different
        assert "stem.weight from different steps: rank 0 from step 2" in different
        assert f"rank {world_size // 2} from step 4" in different
        assert same == "nothing was raised"


# -- ranks that are given different things -----------------------------------------------------------------------------


def give_differently(rank: int, host: str, folder: str) -> dict[str, str]:
    """Give ``model=`` and ``frozen=`` on rank 0 only, in every call, and freeze a vector there."""
    training, told = Training(host, kind="vit"), dict[str, str]()
    training.train(range(2))
    training.save(f"{folder}/right")
    for name, arguments in (
        ("model", {"model": training.model if rank == 0 else None}),
        ("frozen", {"model": training.model, "frozen": rank == 0}),
    ):
        for call in (checkpoint.save, checkpoint.async_save):
            told[f"{call.__name__} {name}"] = said(lambda: call(training.handle, f"{folder}/wrong", **arguments))  # noqa: B023
        told[f"load {name}"] = said(lambda: checkpoint.load(training.handle, f"{folder}/right", **arguments))  # noqa: B023
    if rank == 0:
        bias = hosts.named(training.model, host)["head.bias"].requires_grad_(False)
        bias.grad = None
    told["trained"] = said(lambda: training.save(f"{folder}/wrong"))
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_arguments_and_trained_parameters_are_the_same_on_every_rank(host: str, tmp_path: Path) -> None:
    for told in hosts.run_ranks(2, give_differently, host, str(tmp_path)):
        for call in ("save", "async_save", "load"):
            model, frozen = told[f"{call} model"], told[f"{call} frozen"]
            assert model.startswith("ValueError: model= was given on rank(s) 0, but not on rank(s) 1:"), model
            assert frozen.startswith("ValueError: frozen= is True on rank(s) 0, but False on rank(s) 1:"), frozen
        assert told["trained"].startswith("ValueError: head.bias is trained on rank(s) 1, but not on rank(s) 0:")
    assert not list(tmp_path.glob("wrong/*"))


def give_what_is_wrong(rank: int, host: str, folder: str) -> dict[str, str]:
    """Give rank 1 something that no call can begin with."""
    training, told = Training(host), dict[str, str]()
    training.train(range(2))
    training.save(f"{folder}/right")
    own = training.model if rank == 0 else "no model"
    for call in (checkpoint.save, checkpoint.async_save, checkpoint.load):
        told[f"{call.__name__} model"] = said(lambda: call(training.handle, f"{folder}/right", model=own))  # noqa: B023
        told[f"{call.__name__} directory"] = said(lambda: call(training.handle, None if rank else f"{folder}/right"))  # noqa: B023
        if host == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(training.model, writeback=False):
                told[f"{call.__name__} whole"] = said(
                    lambda: call(training.handle, f"{folder}/right", model=None if rank else training.model)  # noqa: B023
                )
    training.load(f"{folder}/right")
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp1", "fsdp2"])
def test_what_one_rank_was_given_in_vain_is_raised_on_every_rank(host: str, tmp_path: Path) -> None:
    for rank, told in enumerate(hosts.run_ranks(2, give_what_is_wrong, host, str(tmp_path))):
        of = "" if rank else "rank 1: "
        for call in ("save", "async_save", "load"):
            assert told[f"{call} model"] == f"TypeError: {of}model must be a torch.nn.Module, not str", told
            assert told[f"{call} directory"].startswith(f"TypeError: {of}"), told
            assert "NoneType" in told[f"{call} directory"], told
            if host == "fsdp1":
                assert "inside FSDP.summon_full_params()" in told[f"{call} whole"] or rank, told
                assert told[f"{call} whole"] != "nothing was raised", told


# -- saves that fail ---------------------------------------------------------------------------------------------------


def fail_to_save(rank: int, folder: str) -> dict[str, tuple[str, list[str], bool]]:
    """What each failing save says and leaves, and whether the checkpoint is the one before."""
    training, place, told = Training("fsdp2"), Path(folder), dict[str, Any]()
    training.train(range(2))
    training.save(place)
    first = checkpoint.read_manifest(place)["data"]
    full = OSError(28, "No space left on device")

    def write(self: Any, *args: Any) -> Any:
        written(self, *args)
        raise full

    def in_background() -> None:
        checkpoint.async_save(training.handle, place, model=training.model).result()

    written = files.FileSystemWriter.write_data
    for name, victim, holder, function, replacement in (
        ("folder", 1, files.Path, "mkdir", mock.Mock(side_effect=full)),
        ("token", 0, files.Path, "touch", mock.Mock(side_effect=full)),
        ("data", 1, files.FileSystemWriter, "write_data", write),
        ("background", 1, files.FileSystemWriter, "write_data", write),
        ("checksums", 1, files, "file_checksum", mock.Mock(side_effect=full)),
        ("manifest", 0, files.json, "dump", mock.Mock(side_effect=full)),
        ("after the manifest", 0, files.Path, "glob", mock.Mock(side_effect=full)),
    ):
        save = in_background if name == "background" else lambda: training.save(place)
        with mock.patch.object(holder, function, replacement if rank == victim else getattr(holder, function)):
            error = said(save)
        dist.barrier()
        left = [path.name for path in place.iterdir()]
        told[name] = error, left, checkpoint.read_manifest(place)["data"] == first
        dist.barrier()
    training.load(place)
    training.save(place)
    dist.barrier()
    told["then"] = "", [path.name for path in place.iterdir()], checkpoint.read_manifest(place)["data"] == first
    return told


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for told in hosts.run_ranks(2, fail_to_save, str(tmp_path)):
        for name, (error, left, is_first) in told.items():
            replaced = name == "after the manifest"
            assert len(left) == 2 + replaced and "manifest.json" in left, (name, left)
            assert is_first == (not replaced and name != "then"), name
            assert name == "then" or (error.startswith("OSError") and "No space left" in error), (name, error)


# -- tensors that no checkpoint can hold -------------------------------------------------------------------------------

ODD = {
    "expanded": (torch.zeros(1).expand(4), r"odd of shape \(4,\) has several elements in one place in memory"),
    "sparse": (torch.eye(4).to_sparse(), r"odd has layout torch\.sparse_coo"),
}


def with_tensor(tensor: Tensor, frozen: bool = False) -> tuple[nn.Module, Shampoo4]:
    """A model, after a step, that has the tensor as a buffer or as a frozen parameter."""
    model = nn.Linear(4, 6)
    if frozen:
        model.odd = nn.Parameter(tensor, requires_grad=False)
    else:
        model.register_buffer("odd", tensor)
    optimizer = Shampoo4(model.named_parameters(), lr=0.1, min_quant_numel=0)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_dense_are_refused(kind: str, frozen: bool, tmp_path: Path) -> None:
    odd, message = ODD[kind]
    model, optimizer = with_tensor(odd, frozen)
    with pytest.raises(ValueError, match=message):
        checkpoint.save(optimizer, tmp_path, model=model)
    assert not list(tmp_path.iterdir())

    dense, other = with_tensor(torch.ones(odd.shape), frozen)
    checkpoint.save(other, tmp_path, model=dense)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load(optimizer, tmp_path, model=model)
    assert optimizer.state == states
    assert all(
        torch.equal(parameter.to_dense(), before[name].to_dense()) for name, parameter in model.named_parameters()
    )

    if frozen:
        checkpoint.save(optimizer, tmp_path, model=model, frozen=False)
        checkpoint.load(optimizer, tmp_path, model=model, frozen=False)
