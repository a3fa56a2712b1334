"""Portable checkpoints know parameters by their names without what wrappers put into them, and cross nothing."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support.contract import FAST
from support.training import FIRST, KIND, OPTIONS, THEN
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.checkpoint import files
from sharded_shampoo4.integrations import fsdp

# Host, what wraps the model and its unit before, and what wraps it after.
WRAPPINGS: dict[str, tuple[str, bool, bool, bool]] = {
    "plain": ("none", False, False, False),
    "compiled": ("none", False, False, True),
    "checkpointed": ("none", True, False, False),
    "ddp": ("ddp", False, False, False),
    "ddp of a compiled, checkpointed one": ("ddp", True, True, False),
    "compiled ddp": ("ddp", False, False, True),
    "fsdp1": ("fsdp1", False, False, False),
    "compiled, checkpointed fsdp1": ("fsdp1", True, False, True),
    "fsdp2": ("fsdp2", False, False, False),
    "compiled, checkpointed fsdp2": ("fsdp2", True, False, True),
}


class Wrapped:
    """A model under a host and in wrappers, and an optimizer made of its parameters afterwards, as users do."""

    def __init__(self, wrapping: str, seed: int = 0) -> None:
        self.host, checkpointed, inside, outside = WRAPPINGS[wrapping]
        model: Any = hosts.make_model(KIND, seed)
        if checkpointed:
            model.middle = checkpoint_wrapper(model.middle)
            model.units = [model.middle]
        model = torch.compile(model, backend="eager") if inside else model
        model = hosts.wrap(model, self.host)
        self.model = torch.compile(model, backend="eager") if outside else model
        self.optimizer = Shampoo4(self.model.named_parameters(), **{**FAST, **OPTIONS})
        if self.host == "fsdp1":
            fsdp.bind(self.optimizer, self.model)

    def train(self, steps: range) -> dict[str, Tensor]:
        for step in steps:
            hosts.set_gradients(self.model, self.host, hosts.make_gradients(KIND, step))
            self.optimizer.step()
        return hosts.full_parameters(self.model, self.host)


def manifest(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / checkpoint.MANIFEST).read_text())["manifest"]


def save_all(rank: int, folder: str) -> None:
    for number, wrapping in enumerate(WRAPPINGS):
        training = Wrapped(wrapping)
        training.train(FIRST)
        checkpoint.save(training.optimizer, f"{folder}/{wrapping}", model=training.model if number % 2 else None)


def load_all(rank: int, folder: str) -> dict[tuple[str, str], bool]:
    reference = Wrapped("plain")
    expected = reference.train(FIRST), reference.train(THEN)
    found = {}
    names = list(WRAPPINGS)
    for number, source in enumerate(names):
        for shift in (1, 3, 8):
            target = names[(number + shift) % len(names)]
            training = Wrapped(target, seed=1)
            checkpoint.load(training.optimizer, f"{folder}/{source}", model=training.model if shift == 3 else None)
            results = hosts.full_parameters(training.model, training.host), training.train(THEN)
            found[source, target] = all(
                torch.equal(there[name], here[name])
                for here, there in zip(expected, results, strict=True)
                for name in here
            )
    return found


def test_a_checkpoint_of_one_wrapping_continues_in_every_other(tmp_path: Path) -> None:
    hosts.run_ranks(2, save_all, str(tmp_path))
    plain = sorted(name for name, _ in hosts.make_model(KIND).named_parameters())
    for wrapping in WRAPPINGS:
        assert sorted(manifest(tmp_path / wrapping)["parameters"]) == plain, wrapping
    for found in hosts.run_ranks(2, load_all, str(tmp_path)):
        assert len(found) == 30
        assert [pair for pair, same in found.items() if not same] == []


# -- models with parts of their own that are called module -------------------------------------------------------------


class Sole(nn.Module):
    """All of it is in ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


class Beside(nn.Module):
    """Without ``module.``, two of its parameters would have one name, and they have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.module = nn.Linear(6, 6)


class Deep(nn.Module):
    """A part of it may be wrapped alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.module = nn.Linear(6, 6), nn.Linear(6, 6)


class Ambiguous(nn.Module):
    """Of which nobody can tell from names alone whether a part of it is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.module = Beside(), nn.Linear(6, 6)


WHOLE, PART = ("", "ddp", "twice"), ("", "ddp", "a part")
KINDS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    *((Sole, WHOLE), (Beside, WHOLE)),
    *((Deep, PART), (Ambiguous, PART)),
)


def make(kind: type[nn.Module], wrapped: str, seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    model: Any = kind()
    plain = model
    if wrapped == "a part":
        plain.encoder = DistributedDataParallel(plain.encoder)
    elif wrapped:
        model = DistributedDataParallel(DistributedDataParallel(model) if wrapped == "twice" else model)
    return plain, model


def pass_values(rank: int, folder: str) -> dict[str, list[Any]]:
    """Every pair of wrappings, with and without the model: the pairs whose values did not arrive, and those refused."""
    wrong: dict[str, list[Any]] = {"wrong": [], "refused": []}
    for kind, source, target, saved_with, loaded_with in (
        (kind, *pair, *models)
        for kind, wrappings in KINDS
        for pair in itertools.product(wrappings, repeat=2)
        for models in itertools.product((False, True), repeat=2)
    ):
        (first, of_first), (second, of_second) = make(kind, source, 0), make(kind, target, 1)
        own, other = Shampoo4(of_first.named_parameters()), Shampoo4(of_second.named_parameters())
        checkpoint.save(own, folder, model=of_first if saved_with else None)
        case = (kind.__name__, source, target, saved_with, loaded_with)
        try:
            checkpoint.load(other, folder, model=of_second if loaded_with else None)
        except ValueError:
            wrong["refused"].append(case)
        else:
            if not all(map(torch.equal, first.parameters(), second.parameters())):
                wrong["wrong"].append(case)
    return wrong


def test_a_models_own_module_is_no_wrapper(tmp_path: Path) -> None:
    for found in hosts.run_ranks(2, pass_values, str(tmp_path)):
        assert found["wrong"] == []
        for kind, source, target, saved_with, loaded_with in found["refused"]:
            assert kind == "Ambiguous"
            assert (source == "a part" and not saved_with) or (target == "a part" and not loaded_with)


# -- checkpoints of early versions -------------------------------------------------------------------------------------


def rename_stored(folder: Path, rename: Mapping[str, str]) -> None:
    """Make a checkpoint one of an early version, whose manifest and files had names as they were given."""
    own = checkpoint.read_manifest(folder)
    assert own.pop("plain_names")
    own["parameters"] = {rename[name]: entry for name, entry in own["parameters"].items()}
    data = folder / own["data"]
    path = data / ".metadata"
    metadata = pickle.loads(path.read_bytes())

    def renamed(key: str) -> str:
        kind, _, rest = key.partition("/")
        name, slash, block = rest.partition("/")
        return f"{kind}/{rename.get(name, name)}{slash}{block}"

    metadata.state_dict_metadata = {renamed(key): value for key, value in metadata.state_dict_metadata.items()}
    metadata.planner_data = {renamed(key): (renamed(key),) for key in metadata.planner_data}
    metadata.storage_data = {
        replace(index, fqn=renamed(index.fqn)): value for index, value in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    own["files"][".metadata"] = files.file_checksum(path)
    files.write_manifest(folder, own)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
)
@pytest.mark.parametrize("with_model", [False, True])
def test_names_of_early_versions_are_read(tmp_path: Path, prefix: str, with_model: bool) -> None:
    with hosts.one_thread():
        first = Wrapped("plain")
        first.train(FIRST)
        checkpoint.save(first.optimizer, tmp_path, model=first.model)
        plain = [name for name, _ in first.model.named_parameters()]
        rename_stored(tmp_path, {name: prefix + name for name in plain})
        second = Wrapped("compiled", seed=1)
        checkpoint.load(second.optimizer, tmp_path, model=second.model if with_model else None)
        expected, found = first.train(THEN), second.train(THEN)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_names_that_become_equal_are_refused(tmp_path: Path) -> None:
    first = Wrapped("plain")
    checkpoint.save(first.optimizer, tmp_path)
    plain = [name for name, _ in first.model.named_parameters()]
    rename = {name: name for name in plain} | {"norm.weight": "_orig_mod.norm.bias"}
    rename_stored(tmp_path, rename)
    with pytest.raises(ValueError, match=r"norm.bias .* named norm.bias without what wrappers put"):
        checkpoint.load(first.optimizer, tmp_path)
    twice = [("0.weight", nn.Parameter(torch.zeros(3, 3))), ("_orig_mod.0.weight", nn.Parameter(torch.zeros(3, 3)))]
    with pytest.raises(ValueError, match=r"two parameters have the name 0.weight"):
        checkpoint.save(Shampoo4(twice), tmp_path)
