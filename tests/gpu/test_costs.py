"""What steps of a ViT-B cost on a GPU: no synchronization in ordinary steps, memory as estimated, kernels, and times.

``SHAMPOO4_GPU_REPORT`` names the JSON file that times go to.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from support.meta_steps import LAYOUTS, VIT_B, count_vit_b
from support.vit import vit_shapes
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sharded_shampoo4 import Shampoo4, estimate_memory

pytestmark = pytest.mark.gpu

SOAP: dict[str, dict[str, Any]] = {"soap": {"method": "soap"}, "soap-compact": {"preset": "compact"}}
CASES = {**LAYOUTS, **SOAP}
INTERVALS = {"statistics_interval": 2, "root_interval": 4}
SOAP_INTERVALS = {"statistics_interval": 2, "interval_warmup": False}
WARM = 5  # steps, after which nothing is new: statistics, roots and directions were all there
SCRATCH_MIB = 2048
WORKSPACE_MIB = 64  # that cuBLAS takes once, and keeps
SMALL = vit_shapes(96, 2, image=64, classes=10)  # on a CPU


class Training:
    """A ViT-B with gradients of noise."""

    def __init__(self, device: torch.device, layout: str, **options: Any) -> None:
        shapes = VIT_B if device.type == "cuda" else SMALL
        self.device = device
        self.parameters = {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        self.options = {"scratch_mib": SCRATCH_MIB, **CASES[layout], **options}
        intervals = SOAP_INTERVALS if layout in SOAP else INTERVALS
        self.optimizer = Shampoo4(self.parameters.items(), **intervals, **self.options)
        self.steps = 0
        for parameter in self.parameters.values():
            parameter.grad = torch.empty_like(parameter)

    def fill_gradients(self) -> None:
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad.normal_()

    def step(self) -> str:
        """Take a step; tells of which kind it was."""
        self.fill_gradients()
        self.optimizer.step()
        self.steps += 1
        return kind(self.steps)

    def timed_step(self) -> tuple[str, float]:
        """The kind of a step, and its milliseconds."""
        self.fill_gradients()
        self._synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        self._synchronize()
        self.steps += 1
        return kind(self.steps), 1e3 * (time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def kind(step: int) -> str:
    if step % 2 == 0:
        return "roots" if step % 4 == 0 else "statistics"
    return "ordinary" if step > 4 else "before roots"


@contextlib.contextmanager
def synchronizations(mode: str) -> Iterator[list[str]]:
    """Raise at a synchronization (``"error"``), or collect the warnings (``"warn"``)."""
    messages: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield messages
        finally:
            torch.cuda.set_sync_debug_mode("default")
        messages += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


# -- CUDA only ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", CASES)
def test_ordinary_steps_do_not_synchronize(layout: str, cuda: torch.device) -> None:
    training = Training(cuda, layout)
    training.step()
    training.step()
    with synchronizations("error"):
        assert training.step() == "before roots"
    while training.steps <= WARM or training.steps % 2:
        training.step()
    with synchronizations("error"):
        assert training.step() == "ordinary"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refresh_synchronizes_as_often_as_counted_without_a_gpu(layout: str, cuda: torch.device) -> None:
    training = Training(cuda, layout)
    while training.steps < WARM:
        training.step()
    counted = count_vit_b(1, layout)
    for _ in range(3):  # statistics, ordinary, roots
        with synchronizations("warn") as found:
            name = training.step()
        expected = getattr(counted, name).synchronizations
        print(f"{layout}, {name}: {len(found)} synchronizations, {expected} were counted")
        assert len(found) <= expected


def test_the_debug_mode_notices_a_synchronization(cuda: torch.device) -> None:
    values = torch.ones(3, device=cuda)
    with synchronizations("warn") as found:
        values.sum().item()
    assert len(found) == 1
    with pytest.raises(RuntimeError, match="synchroniz"), synchronizations("error"):
        values.sum().item()


@pytest.mark.parametrize("layout", CASES)
def test_peak_memory_is_within_what_is_estimated(layout: str, cuda: torch.device) -> None:
    """Parameters, gradients, states and the scratch memory. The fused base has no memory of its own in passing."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training = Training(cuda, layout, fused=True)
    while training.steps < 8:
        training.step()
    estimate = estimate_memory(training.parameters, host="none", **training.options)
    assert sum(training.optimizer.state_bytes().values()) == estimate.total[0]
    parameters = sum(parameter.nbytes for parameter in training.parameters.values())
    lasting = 2 * parameters + estimate.total[0]
    passing = torch.cuda.max_memory_allocated() - before - lasting
    print(f"{layout}: {lasting / 2**20:.0f} MiB last, {passing / 2**20:.0f} MiB more at the peak")
    assert passing <= (SCRATCH_MIB + WORKSPACE_MIB) * 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_kernels_as_counted_without_a_gpu(layout: str, cuda: torch.device) -> None:
    """But for a factor of 1.5: a product may take two kernels, and newer CUDA takes more tensors in one."""
    training = Training(cuda, layout)
    while training.steps <= WARM:
        training.step()
    training.fill_gradients()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        training.optimizer.step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    copies = [name for name in on_device if name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
    counted = count_vit_b(1, layout).ordinary.kernels
    print(f"{layout}: {len(on_device)} kernels, {counted} were counted")
    assert not copies
    assert counted / 1.5 <= len(on_device) <= counted * 1.5


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_are_reported(device: torch.device, tmp_path: Path) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "milliseconds": {}}
    for layout in CASES:
        training = Training(device, layout)
        times: dict[str, list[float]] = defaultdict(list)
        while training.steps < 12:
            kind_of_step, milliseconds = training.timed_step()
            if training.steps > 2:
                times[kind_of_step].append(milliseconds)
        report["milliseconds"][layout] = {key: round(median(values), 3) for key, values in times.items()}
    file = Path(os.environ.get("SHAMPOO4_GPU_REPORT", tmp_path / "gpu.json"))
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(file.read_text())
    for layout, found in json.loads(file.read_text())["milliseconds"].items():
        assert found.keys() == {"before roots", "ordinary", "statistics", "roots"}
        assert 0 < found["ordinary"] < found["roots"]
        assert layout in SOAP or found["before roots"] < found["ordinary"]
