"""PortableAccelerator: hooks, teachers, several models and optimizers, names; what cannot be saved is refused early."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin
from support import worlds as hosts
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import get_scheduler

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.integrations.accelerate import PortableAccelerator, keep_offloaded
from sharded_shampoo4.integrations.rehearsal import adjust_deepspeed

OPTIONS: dict[str, Any] = {"statistics_interval": 1, "min_quant_numel": 0}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Accelerate's state taken back after the test."""
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


def step(accelerator: Any, *pairs: tuple[nn.Module, Any], count: int = 3) -> None:
    for seed in range(count):
        for model, optimizer in pairs:
            torch.manual_seed(seed)
            model.zero_grad()
            accelerator.backward(model(torch.randn(4, 6)).square().mean())
            optimizer.step()


def copies(*models: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_hooks_are_given_the_models(tmp_path: Path) -> None:
    accelerator = PortableAccelerator(cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, Shampoo4(model.named_parameters(), **OPTIONS))
    step(accelerator, (model, optimizer))
    seen: list[Any] = []

    def saving(models: list[Any], weights: list[Any], folder: str) -> None:
        seen.append((list(models), list(accelerator._models), len(weights)))
        torch.save(models[0].state_dict(), Path(folder) / "adapter.pt")

    def loading(models: list[Any], folder: str) -> None:
        assert (Path(folder) / "adapter.pt").exists()
        seen.append((list(models), list(accelerator._models), None))
        models.pop()

    accelerator.register_save_state_pre_hook(saving)
    handle = accelerator.register_load_state_pre_hook(loading)
    before = copies(model)
    for _ in range(2):
        accelerator.save_state(str(tmp_path))
        step(accelerator, (model, optimizer))
        accelerator.load_state(str(tmp_path))
        assert equal(copies(model), before)
    assert [(models == [model], own == [model]) for models, own, _ in seen] == [(True, True)] * 4
    assert accelerator._models == [model] and accelerator._optimizers == [optimizer]
    handle.remove()
    accelerator.load_state(str(tmp_path))
    assert len(seen) == 4


def test_a_frozen_teacher_beside_the_student(tmp_path: Path) -> None:
    accelerator = PortableAccelerator(cpu=True)
    teacher, student = net(1).requires_grad_(False), net(2)
    teacher, student, optimizer = accelerator.prepare(teacher, student, Shampoo4(student.named_parameters(), **OPTIONS))
    step(accelerator, (student, optimizer))
    expected = copies(teacher, student)
    accelerator.save_state(str(tmp_path))
    step(accelerator, (student, optimizer))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1)
    accelerator.load_state(str(tmp_path))
    assert equal(copies(teacher, student), expected)
    manifest = json.loads((tmp_path / "shampoo4" / checkpoint.MANIFEST).read_text())["manifest"]
    assert sorted(manifest["parameters"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize("turned", [False, True])
def test_two_models_with_two_optimizers(tmp_path: Path, turned: bool) -> None:
    """One of them AdamW; in whatever order."""
    accelerator = PortableAccelerator(cpu=True)
    first, second = net(1), net(2)
    optimizers: list[Any] = [
        Shampoo4(first.parameters(), **OPTIONS),
        Shampoo4(second.named_parameters(), **OPTIONS),
    ]
    models = [first, second]
    prepared = accelerator.prepare(*(models[::-1] if turned else models), *optimizers)
    pairs = [(first, prepared[2]), (second, prepared[3])]
    step(accelerator, *pairs)
    accelerator.save_state(str(tmp_path))
    expected = copies(first, second)
    step(accelerator, *pairs)
    then = copies(first, second)
    accelerator.load_state(str(tmp_path))
    assert equal(copies(first, second), expected)
    step(accelerator, *pairs)
    assert equal(copies(first, second), then)


def test_another_optimizer_for_a_part_of_the_model(tmp_path: Path) -> None:
    accelerator = PortableAccelerator(cpu=True, frozen=False)
    model = net(1)
    own = Shampoo4(model[0].named_parameters(prefix="0"), **OPTIONS)
    model, optimizer, other = accelerator.prepare(model, own, torch.optim.AdamW(model[1].parameters()))
    pairs = [(model, optimizer), (model, other)]
    step(accelerator, *pairs)
    accelerator.save_state(str(tmp_path))
    step(accelerator, *pairs)
    then = copies(model)
    accelerator.load_state(str(tmp_path))
    step(accelerator, *pairs)
    assert equal(copies(model), then)


@pytest.mark.parametrize("named", [False, True])
def test_one_optimizer_for_two_models(tmp_path: Path, named: bool) -> None:
    accelerator = PortableAccelerator(cpu=True)
    first, second = net(1), net(2)
    given: list[Any] = [*first.named_parameters(), *second.named_parameters()]
    own = Shampoo4(given if named else [parameter for _, parameter in given], **OPTIONS)
    first, second, optimizer = accelerator.prepare(first, second, own)
    both = nn.Sequential(first, second)
    step(accelerator, (both, optimizer))
    accelerator.save_state(str(tmp_path))
    step(accelerator, (both, optimizer))
    then = copies(both)
    accelerator.load_state(str(tmp_path))
    step(accelerator, (both, optimizer))
    assert equal(copies(both), then)
    manifest = json.loads((tmp_path / "shampoo4" / checkpoint.MANIFEST).read_text())["manifest"]
    assert {"0.0.weight", "1.0.weight"} <= manifest["parameters"].keys()


def test_what_cannot_be_saved_is_refused_by_prepare() -> None:
    accelerator = PortableAccelerator(cpu=True)
    model = net()
    with pytest.raises(ValueError, match="are in none of the 1 prepared models: give the model and the optimizer"):
        accelerator.prepare(model, Shampoo4(net(1).named_parameters(), **OPTIONS))
    reset()
    accelerator, model = PortableAccelerator(cpu=True), net()
    temperature = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="needs names, but parameter 4 of group 0"):
        accelerator.prepare(model, Shampoo4([*model.parameters(), temperature], **OPTIONS))
    reset()
    accelerator, model = PortableAccelerator(cpu=True), net()
    named = [("0.weight", temperature), ("x", model[0].weight), ("0.weight", model[1].weight)]
    with pytest.raises(ValueError, match=r"two parameters have the name 0\.weight"):
        accelerator.prepare(model, Shampoo4(named, **OPTIONS))
    reset()
    accelerator, model = PortableAccelerator(cpu=True), net()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))  # no Shampoo4 at all


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    accelerator = PortableAccelerator(cpu=True, frozen=False)
    model, optimizer = accelerator.prepare(model, Shampoo4(model[1].named_parameters(prefix="1"), **OPTIONS))
    step(accelerator, (model, optimizer))
    accelerator.save_state(str(tmp_path))
    manifest = json.loads((tmp_path / "shampoo4" / checkpoint.MANIFEST).read_text())["manifest"]
    assert manifest["untrained"] == {} and sorted(manifest["parameters"]) == ["1.bias", "1.weight"]
    expected = copies(model[1])
    step(accelerator, (model, optimizer))
    accelerator.load_state(str(tmp_path))
    assert equal(copies(model[1]), expected)


def under_ddp(rank: int, folder: str) -> list[bool]:
    """Automatic names and hooks, where models are wrapped."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = PortableAccelerator(cpu=True)
    assert accelerator.num_processes == 2
    student = net(2)
    optimizer: Any = Shampoo4(student.parameters(), **OPTIONS)
    student, optimizer = accelerator.prepare(student, optimizer)
    seen: list[int] = []
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: seen.append(len(models)))
    step(accelerator, (student, optimizer))
    accelerator.save_state(folder)
    step(accelerator, (student, optimizer))
    then = copies(student)
    accelerator.load_state(folder)
    step(accelerator, (student, optimizer))
    alone = net(3)
    checkpoint.load(Shampoo4(alone.named_parameters(), **OPTIONS), f"{folder}/shampoo4")
    return [equal(copies(student), then), seen == [1]]


def test_under_ddp(tmp_path: Path) -> None:
    assert hosts.run_ranks(2, under_ddp, str(tmp_path)) == [[True, True]] * 2


def scheduled(processes: int, accumulation: int = 1, split: bool = False) -> tuple[Any, ...]:
    """A training of 10 steps with a linear schedule, in Accelerate's units."""
    settings = DataLoaderConfiguration(split_batches=split)
    accelerator = PortableAccelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=settings)
    model = net()
    optimizer: Any = Shampoo4(model.named_parameters(), lr=1e-3, **OPTIONS)
    scheduler = get_scheduler("linear", optimizer, 0, 10 * processes)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def advance(training: tuple[Any, ...], steps: int) -> list[float]:
    """The learning rates of ``steps`` optimizer steps."""
    accelerator, model, optimizer, scheduler = training
    rates: list[float] = []
    while len(rates) < steps:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(4, 6)).square().mean())
            if accelerator.sync_gradients:
                rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rates


def scheduled_on_two(rank: int) -> tuple[Any, ...]:
    """As :func:`scheduled`, in one of two processes that Accelerate knows of."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    training = scheduled(2)
    assert training[0].num_processes == 2
    return training


def on_two_processes(rank: int, folder: str) -> list[float]:
    training = scheduled_on_two(rank)
    rates = advance(training, 3)
    training[0].save_state(folder)
    return rates


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of two processes after 3 of 10 steps."""
    folder = tmp_path_factory.mktemp("of_two")
    for rates in hosts.run_ranks(2, on_two_processes, str(folder)):
        assert rates == pytest.approx([1e-3, 9e-4, 8e-4])
    return folder


def test_a_schedule_goes_on_on_another_number_of_processes(of_two: Path) -> None:
    training = scheduled(1)
    advance(training, 1)
    with pytest.warns(UserWarning, match=r"made 2 steps .*, and makes 1 here: .* last_epoch = 3 instead of 6"):
        training[0].load_state(str(of_two))
    assert training[3].get_last_lr() == pytest.approx([7e-4])
    assert advance(training, 7) == pytest.approx([7e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    assert training[3].get_last_lr() == pytest.approx([0.0])


def test_a_schedule_goes_on_with_split_batches(of_two: Path) -> None:
    """For which Accelerate makes one step in an optimizer step, on any number of processes."""
    training = scheduled(1, split=True)
    with pytest.warns(UserWarning, match="last_epoch = 3 instead of 6"):
        training[0].load_state(str(of_two))
    assert training[3].scheduler.last_epoch == 3


def test_a_schedule_of_another_kind_is_refused(of_two: Path) -> None:
    accelerator, model = PortableAccelerator(cpu=True), net(5)
    own = Shampoo4(model.named_parameters(), **OPTIONS)
    accelerator.prepare(model, own, CosineAnnealingLR(own, 10))
    before = copies(model)
    with pytest.raises(ValueError, match=r"CosineAnnealingLR cannot go on with num_processes = 1.*step it once"):
        accelerator.load_state(str(of_two))
    assert equal(copies(model), before)


@pytest.mark.parametrize("saved", [1, 3])
def test_an_accumulation_begins_anew_with_another_number_of_batches(tmp_path: Path, saved: int) -> None:
    training = scheduled(1, saved)
    advance(training, 3)
    training[0].save_state(str(tmp_path))
    reset()
    same = scheduled(1, saved)[0]
    same.load_state(str(tmp_path))
    assert same.step == 3 * saved
    reset()
    accelerator, model, *_ = scheduled(1, 2)
    accelerator.load_state(str(tmp_path))
    due = []
    for _ in range(4):
        with accelerator.accumulate(model):
            due.append(accelerator.sync_gradients)
    assert due == [False, True, False, True]


def test_an_accumulation_begins_anew_on_another_number_of_processes(of_two: Path) -> None:
    accelerator = scheduled(1)[0]
    accelerator.step = 5
    with pytest.warns(UserWarning, match="made 2 steps"):
        accelerator.load_state(str(of_two))
    assert accelerator.step == 0


def test_a_state_without_counts_is_taken_as_one_of_the_same(tmp_path: Path) -> None:
    training = scheduled(1, 2)
    advance(training, 2)
    training[0].save_state(str(tmp_path))
    (tmp_path / "shampoo4_counts.json").unlink()
    reset()
    training = scheduled(1, 3)
    training[0].load_state(str(tmp_path))
    assert training[0].step == 4 and training[3].scheduler.last_epoch == 2


def test_a_save_that_fails_leaves_no_state_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the optimizer's states of the save before with the schedules of this one."""
    training = scheduled(1)
    advance(training, 1)
    accelerator = training[0]
    accelerator.save_state(str(tmp_path))
    advance(training, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "dcp_save", full)
        with pytest.raises(OSError, match="No space left"):
            accelerator.save_state(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no complete checkpoint of Shampoo4.*no manifest\.json"):
        accelerator.load_state(str(tmp_path))
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))


def save_and_load_badly(rank: int, folder: str) -> list[str]:
    accelerator = scheduled_on_two(rank)[0]
    told = [hosts.said(lambda: accelerator.save_state(f"{folder}/directory"))]
    accelerator.save_state(f"{folder}/damaged")
    if rank == 0:
        (Path(folder) / "damaged" / "shampoo4_counts.json").write_text("{")
    accelerator.wait_for_everyone()
    return [*told, hosts.said(lambda: accelerator.load_state(f"{folder}/damaged"))]


def test_what_fails_on_the_main_process_is_raised_on_all(tmp_path: Path) -> None:
    (tmp_path / "directory" / "shampoo4_counts.json").mkdir(parents=True)
    for saving, loading in hosts.run_ranks(2, save_and_load_badly, str(tmp_path), timeout=60):
        assert saving.startswith("IsADirectoryError") and "shampoo4_counts" in saving
        assert loading.startswith("JSONDecodeError")


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that is saved alike."""
    monkeypatch.setenv("HOME", str(tmp_path))
    accelerator = scheduled(1)[0]
    accelerator.save_state("~/state")
    assert {"shampoo4", "scheduler.bin"} <= {path.name for path in (tmp_path / "state").iterdir()}
    accelerator.load_state("~/state")


def test_a_model_at_stage_3_can_be_saved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = DeepSpeedPlugin(zero_stage=3)
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False
    accelerator: Any = type("Stub", (), {})()
    accelerator.state = type("Stub", (), {"deepspeed_plugin": plugin})()
    accelerator.distributed_type = "DEEPSPEED"
    assert not adjust_deepspeed(accelerator, 0.0)
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_deepspeeds_own_adam_is_refused() -> None:
    plugin = DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu")
    keep_offloaded(plugin)
    assert plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = True
    with pytest.raises(ValueError, match=r"would replace Shampoo4 by DeepSpeedCPUAdam.* offloaded to 'cpu'"):
        keep_offloaded(plugin)
