"""Portable checkpoints where the training is set up otherwise than when they were saved: other layers are frozen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import FAST
from support.training import FIRST, KIND, OPTIONS, THEN, Training
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint

HOSTS = ("none", "ddp", "fsdp1", "fsdp2", "zero1", "zero3")


class Setup(Training):
    """A model of which some layers are frozen, under a host; the optimizer has what is trained, or everything."""

    def __init__(self, host: str, frozen: Sequence[str] = (), seed: int = 0, kind: str = KIND, **options: Any) -> None:
        self.host, self.kind = host, kind
        model: Any = hosts.make_model(kind, seed)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        model.register_buffer("seen", torch.tensor([7.0]) + seed)
        self._start(model, options)

    def gradients(self, step: int) -> dict[str, Tensor | None]:
        model = self.model.module if self.host.startswith("zero") else self.model
        trained = {name for name, p in hosts.named(model, self.host).items() if p.requires_grad}
        return {name: g if name in trained else None for name, g in super().gradients(step).items()}

    def steps(self) -> dict[str, int]:
        """How many each factor has taken."""
        session = self.optimizer._session
        session.attach_all(self.optimizer.param_groups, self.optimizer.state, self.optimizer, "state_dict()")
        return {matrix.name: matrix.step for distributor in session.all() for matrix in distributor.matrices}


def remarks(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught if "checkpoint was saved" in str(warning.message)]


def save_then_freeze_others(rank: int, folder: str, host: str) -> None:
    zero.prepare()
    training = Setup(host, frozen=["middle"])
    training.train(FIRST)
    checkpoint.save(training.handle, f"{folder}/{host}", model=training.model)
    training.end()


def freeze_others(rank: int, folder: str, sources: tuple[str, ...], hosts_here: tuple[str, ...]) -> dict[Any, Any]:
    zero.prepare()
    found = {}
    for source in sources:
        for host in hosts_here:
            training = Setup(host, frozen=["stem"], seed=1)
            training.train(range(2))  # states that must not stay
            said = remarks(lambda t=training, s=source: checkpoint.load(t.handle, f"{folder}/{s}", model=t.model))
            found[source, host] = training.parameters(), training.steps(), said, training.train(THEN)
            training.end()
    return found


@pytest.mark.parametrize("world_size", [2])
def test_other_layers_may_be_frozen(tmp_path: Path, world_size: int) -> None:
    for host in HOSTS[1:]:
        hosts.run_ranks(world_size, save_then_freeze_others, str(tmp_path), host)
    with hosts.one_thread():
        original = Setup("none", frozen=["middle"])
        expected = original.train(FIRST)
        checkpoint.save(original.handle, tmp_path / "none", model=original.model)
        alone = freeze_others_alone(str(tmp_path))
    results = hosts.run_ranks(world_size, freeze_others, str(tmp_path), HOSTS[:3], HOSTS[1:])[0]
    results |= hosts.run_ranks(world_size, freeze_others, str(tmp_path), HOSTS[3:], HOSTS[1:4])[0]
    for pair, (values, steps, said, then) in results.items():
        assert all(torch.equal(values[name], expected[name]) for name in expected), pair
        assert steps == {"middle.weight": 0, "head.weight": 5}, pair
        assert len(said) == 2, (pair, said)
        assert said[0].startswith("middle.bias, middle.weight were not trained when") or "middle.weight" in said[0]
        assert "stem.weight" in said[1] and "frozen now: their values are loaded" in said[1]
        if not pair[1].startswith("zero"):  # which counts steps for all parameters together
            assert all(torch.equal(then[name], alone[name]) for name in alone), pair


def freeze_others_alone(folder: str) -> dict[str, Tensor]:
    training = Setup("none", frozen=["stem"], seed=1)
    training.train(range(2))
    checkpoint.load(training.handle, f"{folder}/none", model=training.model)
    weights = dict(training.model.named_parameters())
    state = training.optimizer.state
    assert not state.get(weights["stem.weight"]) and not state.get(weights["middle.weight"])
    assert float(state[weights["head.weight"]]["step"]) == 5
    return training.train(THEN)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    everything, without = Setup("none"), Setup("none", frozen=["middle"])
    named = [(name, p) for name, p in without.model.named_parameters() if p.requires_grad]
    trained_only = Shampoo4(named, **{**FAST, **OPTIONS})
    everything.train(FIRST)
    checkpoint.save(everything.optimizer, tmp_path)
    with pytest.raises(
        ValueError, match=r"there is no middle.bias, middle.weight here: if it is frozen here, give model="
    ):
        checkpoint.load(trained_only, tmp_path)
    with pytest.warns(UserWarning, match=r"middle.weight, middle.bias were trained .* and are frozen now"):
        checkpoint.load(without.optimizer, tmp_path)  # in its groups
    assert all(
        torch.equal(p, q) for p, q in zip(everything.model.parameters(), without.model.parameters(), strict=True)
    )
    without.train(range(1))
    checkpoint.save(without.optimizer, tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint has no middle.bias, middle.weight"):
        checkpoint.load(everything.optimizer, tmp_path)
    checkpoint.save(without.optimizer, tmp_path, model=without.model, frozen=False)
    with pytest.raises(ValueError, match=r"no middle.bias, middle.weight: frozen parameters were left out"):
        checkpoint.load(everything.optimizer, tmp_path, model=everything.model)


# -- parameters that never had a gradient ------------------------------------------------------------------------------


def save_unused(rank: int, folder: str) -> None:
    zero.prepare()
    for host in HOSTS:
        training = Setup(host, kind="vit")
        training.train(FIRST)
        checkpoint.save(training.handle, f"{folder}/{host}", model=training.model)
        training.end()


def load_unused(rank: int, folder: str) -> dict[Any, bool]:
    zero.prepare()
    reference = Setup("none", kind="vit")
    expected = reference.train(FIRST), reference.train(THEN)
    found = {}
    for source, host in zip((*HOSTS, *HOSTS), (*HOSTS[1:], *HOSTS[3:], *HOSTS[:4]), strict=True):
        training = Setup(host, seed=1, kind="vit")
        checkpoint.load(training.handle, f"{folder}/{source}", model=training.model)
        results = training.parameters(), training.train(THEN)
        names = [name for name in expected[0] if name != "unused.weight"]  # ZeRO has weight decay for it
        found[source, host] = all(
            torch.equal(e[name], r[name]) for e, r in zip(expected, results, strict=True) for name in names
        )
        training.end()
    return found


def test_parameters_that_never_had_a_gradient(tmp_path: Path) -> None:
    hosts.run_ranks(2, save_unused, str(tmp_path))
    for found in hosts.run_ranks(2, load_unused, str(tmp_path)):
        assert len(found) == 11 and [pair for pair, same in found.items() if not same] == []


# -- what adapters stand on --------------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_adapters(rank: int, folder: str, host: str) -> list[Any]:
    zero.prepare()
    training = Setup(host, frozen=["middle", "stem"])
    training.train(FIRST)
    checkpoint.save(training.handle, f"{folder}/{host}", model=training.model, frozen=False)
    other = Setup(host, frozen=["middle", "stem"], seed=1)
    before = other.parameters()
    quiet = remarks(lambda: checkpoint.load(other.handle, f"{folder}/{host}", model=other.model, frozen=False))
    told = remarks(lambda: checkpoint.load(other.handle, f"{folder}/{host}", model=other.model))
    found, expected = other.parameters(), training.parameters()
    left = all(torch.equal(found[n], before[n]) for n in found if n.startswith(("middle", "stem")))
    loaded = all(torch.equal(found[n], expected[n]) for n in found if not n.startswith(("middle", "stem")))
    checkpoint.save(training.handle, f"{folder}/{host}-whole", model=training.model)
    checkpoint.load(other.handle, f"{folder}/{host}-whole", model=other.model, frozen=False)
    left = left and all(
        torch.equal(other.parameters()[n], before[n]) for n in found if n.startswith(("middle", "stem"))
    )
    training.end()
    other.end()
    return [left, loaded, quiet, told]


@pytest.mark.parametrize("host", ["ddp", "fsdp2", "zero3"])
def test_frozen_parameters_are_left_out_by_an_option(tmp_path: Path, host: str) -> None:
    for left, loaded, quiet, told in hosts.run_ranks(2, save_adapters, str(tmp_path), host):
        assert left and loaded and quiet == []
        assert len(told) == 1 and "are left as they are: the checkpoint was saved with frozen=False" in told[0]
    stored = json.loads((tmp_path / host / checkpoint.MANIFEST).read_text())["manifest"]
    assert list(stored["untrained"]) == ["seen"] and stored["frozen"] is False
    frozen = sum(
        p.numel() for name, p in hosts.make_model(KIND).named_parameters() if name.startswith(("middle", "stem"))
    )
    assert bytes_in(tmp_path / f"{host}-whole") - bytes_in(tmp_path / host) > 4 * frozen


# -- names from the model ----------------------------------------------------------------------------------------------


def save_unnamed(rank: int, folder: str) -> list[Any]:
    found = []
    for host in ("ddp", "fsdp2"):
        training = Setup(host)
        training.optimizer = Shampoo4(training.model.parameters(), **{**FAST, **OPTIONS})
        training.train(range(2))
        refused = hosts.said(lambda t=training: checkpoint.save(t.optimizer, folder))
        training.train(range(2, 5))
        checkpoint.save(training.optimizer, f"{folder}/{host}", model=training.model)
        other = Setup("fsdp2" if host == "ddp" else "ddp", seed=1)
        checkpoint.load(other.optimizer, f"{folder}/{host}", model=other.model)
        expected, then = training.train(THEN), other.train(THEN)
        found.append((refused, all(torch.equal(expected[name], then[name]) for name in expected)))
    return found


def test_names_are_taken_from_the_model(tmp_path: Path) -> None:
    for rank in hosts.run_ranks(2, save_unnamed, str(tmp_path)):
        for refused, same in rank:
            assert (
                "needs names, but parameter 0 of group 0 was given without" in refused and "or give model=" in refused
            )
            assert same


def test_another_optimizers_parameters_are_saved_with_the_model(tmp_path: Path) -> None:
    """Also without frozen ones: they are trained."""
    model, other = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))
    checkpoint.save(Shampoo4(model[0].named_parameters(prefix="0")), tmp_path, model=model, frozen=False)
    checkpoint.load(Shampoo4(other[0].named_parameters(prefix="0")), tmp_path, model=other, frozen=False)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
