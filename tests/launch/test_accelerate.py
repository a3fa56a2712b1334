"""Accelerate and the Trainer: real launches on the CPU by the files of launch/configs, and what they must not hide."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from support import forked
from support.configurations import BY_JSON, CONFIGS, HOSTS, LAUNCHERS
from support.launching import LAUNCH, SCRIPTS, accelerate, losses, metrics, results, run_really, train
from support.marks import slow_except
from support.scripts.trainer_script import ARGUMENTS, INTERVALS, Classifier
from transformers import Trainer, TrainingArguments, ViTForImageClassification

# isort: split
import train_vit  # found through launching

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.rehearsal import check_distribution, rehearse_on_cpu
from sharded_shampoo4.integrations.transformers import ConsolidateStates, shampoo4

Process = subprocess.CompletedProcess[str]
Runs = Callable[[str], tuple[Path, Process]]

# In 8 bits: rounding to 4 makes of sums in another order 2e-3 in a loss, to 8 bits 5e-5, and 32 bits keep 1e-6.
# By the paper's rule: soap's first directions give rounding errors of coordinates without gradients full size.
# In float64: what processes round differently grows less.
OPTIMIZER = (
    "--optimizer", "shampoo4-paper", "--bits", 8, "--statistics_interval", 3, "--root_interval", 6,
    "--refresh_dtype", "float64",
)  # fmt: skip
TOLERANCE = 5e-4  # between losses of one process and of two
# 32 images per step, 20 steps an epoch; step 9, from which runs are resumed, is in the middle of the first.
FLAGS = (
    *("--max_train_steps", 24, "--max_train_samples", 640, "--max_eval_samples", 128, "--num_hidden_layers", 2),
    *("--learning_rate", 3e-3, "--logging_steps", 1, "--checkpointing_steps", 9, "--gradient_accumulation_steps", 2),
)
# A run of two processes that goes on elsewhere: where it was, where it goes, images per process and micro-batch there.
MOVES = {
    "fsdp2 to one process": ("fsdp2", None, 16),
    "zero2 to fsdp2": ("zero2", "fsdp2", 8),
    "ddp to zero3": ("ddp", "zero3", 8),
}


# By the launchers themselves; all others as they would start them, see support/forked.py.
REALLY = ("fsdp2", "named in the file", "the deepspeed launcher")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function from a launch's name to its folder and process. A launch is made when it is first asked for."""
    base = tmp_path_factory.mktemp("runs")

    def launch(name: str, launcher: Sequence[object], images: int, *flags: object) -> Process:
        own = (*OPTIMIZER, *FLAGS, "--per_device_train_batch_size", images, *flags)
        return train(base / name, *own, launcher=launcher, run=run_really if name in REALLY else forked.run)

    def go_on(source: str, name: str, launcher: Sequence[object], images: int) -> Process:
        finished(source)
        shutil.copytree(base / source, base / name, ignore=shutil.ignore_patterns("checkpoint-18", "model"))
        return launch(name, launcher, images, "--resume_from_checkpoint", "latest")

    def move(name: str) -> Process:
        source, target, images = MOVES[name]
        return go_on(source, name, accelerate(target, 2) if target else (), images)

    def by_json(name: str) -> Process:
        launcher, file, changes = BY_JSON[name]
        config = {**json.loads((LAUNCH / "configs" / f"{file}.json").read_text()), **changes}
        if config["optimizer"] is None:
            del config["optimizer"]
        else:
            config["optimizer"]["params"].update(
                method="shampoo", bits=8, statistics_interval=3, root_interval=6, refresh_dtype="float64"
            )
        path = base / f"{name}.json"
        path.write_text(json.dumps(config))
        return launch(name, LAUNCHERS[launcher], 8, "--deepspeed_config", path)

    def small(name: str) -> Process:
        expected = CONFIGS[name.removeprefix("small-")]
        script = (SCRIPTS / "accelerate_script.py", base / name, expected)
        return forked.run(*accelerate(name.removeprefix("small-"), int(expected.split()[-2])), *script)

    @functools.cache
    def start(name: str) -> Process:
        if name in HOSTS:
            return launch(name, accelerate(name, 2), 8)
        if name in MOVES:
            return move(name)
        if name in BY_JSON:
            return by_json(name)
        if name.startswith("small-"):
            return small(name)
        host = name.removesuffix("-resumed")
        return go_on(host, name, accelerate(host, 2), 8)

    def finished(name: str) -> tuple[Path, Process]:
        process = start(name)
        assert process.returncode == 0, process.stderr[-3000:]
        return base / name, process

    return finished


@pytest.fixture(scope="module")
def single(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in this process alone."""
    folder = tmp_path_factory.mktemp("single")
    flags = (*OPTIMIZER, *FLAGS, "--per_device_train_batch_size", 16, "--output_dir", folder)
    train_vit.main(list(map(str, flags)))
    reset_accelerate()
    return folder


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate's state taken back after the test."""
    yield
    reset_accelerate()


@pytest.mark.parametrize("host", slow_except(["fsdp2"], HOSTS))
def test_two_processes_train_as_one_does(runs: Runs, single: Path, host: str) -> None:
    folder, process = runs(host)
    found, alone = results(folder), results(single)
    assert (found["host"], alone["host"]) == (HOSTS[host], "one process")
    assert process.stderr.count("rehearsing on the CPU, 2 processes over gloo") == 1
    assert HOSTS[host] in process.stdout and "process 1, measured" in process.stdout
    assert "Warning" not in process.stderr, "none that a user cannot act on: integrations.quiet"
    assert len(losses(folder)) == 24
    assert losses(folder) == pytest.approx(losses(single), abs=TOLERANCE)
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], abs=TOLERANCE)

    whole, parts = alone["state_bytes"]["base"], [held["base"] for held in found["state_bytes_per_process"]]
    if host == "ddp":
        assert parts == [whole, whole]
    else:
        assert all(0.45 * whole < part < 0.55 * whole for part in parts)
    model = ViTForImageClassification.from_pretrained(folder / "model")
    assert model.config.architectures == ["ViTForImageClassification"]
    weights = ViTForImageClassification.from_pretrained(single / "model").state_dict()
    trained = model.state_dict()
    away, size = (
        torch.stack([value.norm() for value in values]).norm().item()
        for values in ([trained[name] - weights[name] for name in weights], weights.values())
    )
    assert trained.keys() == weights.keys() and away < 0.1 * size, away / size


@pytest.mark.parametrize("name", slow_except(["named in the file"], BY_JSON))
def test_other_launchers_with_a_deepspeed_configuration(runs: Runs, single: Path, name: str) -> None:
    folder, process = runs(name)
    found = results(folder)
    assert found["host"] == HOSTS[BY_JSON[name][1]]
    assert losses(folder) == pytest.approx(losses(single), abs=TOLERANCE)
    assert all(held["preconditioner"] > 0 for held in found["state_bytes_per_process"])
    named = "optimizer" not in BY_JSON[name][2]
    assert ("--optimizer and its options have no effect" in process.stderr + process.stdout) is named
    ViTForImageClassification.from_pretrained(folder / "model")


@pytest.mark.parametrize("host", slow_except(["fsdp2"], HOSTS))
def test_a_resumed_launch_is_the_same_run(runs: Runs, host: str) -> None:
    (full, _), (resumed, process) = runs(host), runs(f"{host}-resumed")
    assert f"Resumed from {resumed / 'checkpoint-9'}" in process.stderr
    assert metrics(resumed) == metrics(full)
    weights, again = (load_file(folder / "model" / "model.safetensors") for folder in (full, resumed))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("name", slow_except(["fsdp2 to one process"], MOVES))
def test_a_run_goes_on_under_another_host_and_rank_count(runs: Runs, single: Path, name: str) -> None:
    folder, process = runs(name)
    assert f"Resumed from {folder / 'checkpoint-9'}" in process.stderr
    target = MOVES[name][1]
    assert results(folder)["host"] == (HOSTS[target] if target else "one process")
    assert losses(folder) == pytest.approx(losses(single), abs=TOLERANCE)


@pytest.mark.parametrize("config", slow_except(["ddp"], CONFIGS))
def test_every_configuration_runs_what_it_says_or_is_refused(runs: Runs, config: str) -> None:
    asked, (_, process) = CONFIGS[config], runs(f"small-{config}")
    assert "shampoo4 trained in both orders and in mixed precision" in process.stdout
    refusals = [line for line in process.stdout.splitlines() if line.startswith("refused")]
    if config == "hsdp":
        # Each process without rehearsing first, then with cpu=True.
        assert len(refusals) == 8 and sum("does not match num_processes" in line for line in refusals) == 4
        return
    assert sum(line.startswith(f"refused: asked for {asked}, got one process (") for line in refusals) == 2
    fallen_back = sum(line.startswith(f"refused: asked for {asked}, got DDP on 2 processes (") for line in refusals)
    assert fallen_back == (0 if config == "ddp" else 2)


def test_the_script_stops_when_it_is_not_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, one_process: None) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    check_distribution(accelerator, model)
    assert not rehearse_on_cpu(), "nothing was launched"
    for variable, asked in (("ACCELERATE_USE_FSDP", "FSDP2 on 2"), ("ACCELERATE_USE_DEEPSPEED", "ZeRO-3 on 2")):
        details = {"WORLD_SIZE": "2", "FSDP_VERSION": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", variable: "true"}
        for name, value in details.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=f"asked for {asked} processes, got one process"):
            check_distribution(accelerator, model)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="too late"):
        rehearse_on_cpu()


# -- the Trainer -------------------------------------------------------------------------------------------------------


def digits() -> list[dict[str, Any]]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, data.target, strict=True)]


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder),
        max_steps=14,
        save_steps=7,
        **ARGUMENTS,
        **arguments,
    )
    return Trainer(
        Classifier(),
        args,
        train_dataset=digits(),
        optimizer_cls_and_kwargs=shampoo4(args, **INTERVALS),
        callbacks=[ConsolidateStates()],
    )


def test_the_trainer_trains_saves_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Shampoo4, "consolidate_state_dict", lambda self: calls.append(len(self.state)), raising=False)
    full = make_trainer(tmp_path)
    full.train()
    assert len(calls) == 2 and all(calls), "before each checkpoint"
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

    first, second = ([line for line in t.state.log_history if "grad_norm" in line] for t in (full, resumed))
    assert [line["step"] for line in second] == list(range(1, 15))
    assert [(line["loss"], line["grad_norm"]) for line in first] == [(ln["loss"], ln["grad_norm"]) for ln in second]
    weights, again = full.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    states = [trainer.optimizer.optimizer.state_dict() for trainer in (full, resumed)]
    packed, repacked = (
        [s["preconditioner"] for s in state["state"].values() if "preconditioner" in s] for state in states
    )
    assert packed and all(torch.equal(a, b) for a, b in zip(packed, repacked, strict=True))


def test_the_factory_makes_the_trainers_own_groups(tmp_path: Path, one_process: None) -> None:
    trainer = make_trainer(tmp_path)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    own = [sorted(group["param_names"]) for group in optimizer.param_groups]
    assert own == [sorted(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups]
    trainer.optimizer, trainer.optimizer_cls_and_kwargs = None, None
    groups = trainer.create_optimizer().param_groups
    assert own == [sorted(names[parameter] for parameter in group["params"]) for group in groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}

    factory, options = shampoo4(trainer.args, lr=1.0, weight_decay=0.0)
    assert [group["lr"] for group in factory()(torch.nn.Linear(3, 3), **options).param_groups] == [1.0, 1.0]
    with pytest.raises(TypeError, match="needs TrainingArguments or lr"):
        shampoo4(statistics_interval=10)


def test_states_that_a_host_saves_by_itself_are_not_consolidated(
    one_process: None,
    monkeypatch: pytest.MonkeyPatch,  # in this order: what is patched goes back before the state goes
) -> None:
    calls: list[Any] = []
    stub: Any = SimpleNamespace(consolidate_state_dict=lambda: calls.append(1))
    control, callback = SimpleNamespace(should_save=True), ConsolidateStates()
    args = SimpleNamespace(save_strategy="best")
    PartialState(cpu=True)
    for optimizer in (stub, SimpleNamespace(optimizer=stub), torch.optim.SGD([torch.zeros(1)], lr=1.0)):
        callback.on_step_end(args, None, control, optimizer=optimizer)
    assert len(calls) == 2
    callback.on_evaluate(args, None, control, optimizer=None)
    callback.on_evaluate(args, None, control, optimizer=stub)
    assert len(calls) == 3
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", "FSDP")
    callback.on_epoch_end(args, None, control, optimizer=stub)
    assert len(calls) == 3


def test_the_configurations_are_those_of_the_documentation() -> None:
    assert {path.stem for path in (LAUNCH / "configs").glob("*.yaml")} >= {"single", "ddp", "fsdp1", "fsdp2", "hsdp"}
