"""Runs of the benchmark: tables, files and errors. Peers have stand-ins here."""

from __future__ import annotations

import gc
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import LAUNCH, run_really
from torch import Tensor, nn

# isort: split
import benchmark  # found through launching
from bench.growth import stack_shapes
from bench.measure import Contender, state_bytes
from bench.optimizers import CHOICES, Choice, vit
from bench.ranks import parts_of

from sharded_shampoo4 import Shampoo4, estimate_memory

assert Path(benchmark.__file__).parent == LAUNCH

TINY = ("--hidden_size", "48", "--num_hidden_layers", "1", "--interval", "2")
NORMS = 16  # bytes of a block that a step leaves behind
PEERS = [name for name, choice in CHOICES.items() if choice.is_peer]


def tiny_shapes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in vit(48, 1).named_parameters()}


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())["optimizers"]}


def offer(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[..., Any], **options: Any) -> Choice:
    """A further optimizer, or another one of that name."""
    choice = Choice(f"{name} of the tests", make, **options)
    monkeypatch.setitem(CHOICES, name, choice)
    return choice


# -- a run -------------------------------------------------------------------------------------------------------------


class Breaks:
    """A peer that raises in a step."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no more steps\nand nobody reads the second line")


def test_a_run_writes_a_table_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "heavyball", None)
    offer(monkeypatch, "breaks-early", lambda *_: Breaks(3), module="json")
    offer(monkeypatch, "breaks-late", lambda *_: Breaks(8), module="json")
    names = ["adamw", "shampoo4", "shampoo4-32bit", "muon", "heavyball-soap", "breaks-early", "breaks-late"]
    benchmark.main(["modes", *TINY, "--steps", "4", "--only", *names[1:], "--output_dir", str(tmp_path)])
    assert gc.isenabled()

    text = capsys.readouterr().out
    assert "refresh every 2 steps, 4 steps; cpu, 1 thread, load before" in text
    assert "Missing: heavyball-soap." in text and "pip install '.[bench]'" in text
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    about, rows = json.loads((tmp_path / "benchmark.json").read_text()), rows_of(tmp_path / "benchmark.json")
    assert list(rows) == ["products", "rotations", *names]
    assert "heavyball" in rows["heavyball-soap"]["missing"] and "cpu_ms" not in rows["heavyball-soap"]
    for name in ("breaks-early", "breaks-late"):
        assert rows[name]["error"] == "RuntimeError: no more steps" and "cpu_ms" not in rows[name]
        assert f"{name} of the tests: RuntimeError: no" in text
    measured = [row for row in rows.values() if "cpu_ms" in row]
    assert len(measured) == 6
    for row in measured:
        times = row["steps"]["wall_ms"]
        warm = 6 if "shampoo4" in row["name"] else 4  # two intervals and two steps
        assert list(map(int, times)) == [warm + 1, warm + 2, warm + 3, warm + 4]
        assert row["wall_ms"]["worst"] == max(times.values()) >= row["wall_ms"]["median"] > 0
        assert row["cpu_ms"]["median"] > 0 and row["transient_bytes"]["refresh"] >= row["transient_bytes"]["ordinary"]

    # What is kept, and the floor.
    elements = about["parameters"]
    assert elements == sum(shape.numel() for shape in tiny_shapes().values())
    assert rows["adamw"]["state_bytes"] == 8 * elements + 4 * len(tiny_shapes())
    kinds = (("shampoo4", {}, "rotations"), ("shampoo4-32bit", {"method": "shampoo", "bits": 32}, "products"))
    for name, options, floor in kinds:
        estimate = estimate_memory(tiny_shapes(), **options).total[0]
        assert 0 <= rows[name]["state_bytes"] - estimate <= NORMS * about["blocks"]
        assert rows[name]["transient_bytes"]["refresh"] > rows[name]["transient_bytes"]["ordinary"]
        ordinary = sum(rows[name]["steps"]["cpu_ms"][step] for step in ("7", "9")) / 2
        assert rows[name]["ordinary_ms"] == pytest.approx(ordinary)
        assert rows[name]["over_floor"] == pytest.approx(ordinary / about["floor_ms"][floor])
        assert about["floor_ms"][floor] == rows[floor]["cpu_ms"]["median"] + rows["adamw"]["cpu_ms"]["median"]
    assert about["blocks"] == 9  # positions, patches, four projections, two of the MLP, the classifier
    assert "over_floor" not in rows["muon"]


def test_an_error_of_ours_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "shampoo4", lambda parameters, _: Shampoo4(parameters, no_such_option=1))
    with pytest.raises(TypeError, match="no_such_option"):
        benchmark.main(["modes", *TINY, "--only", "shampoo4", "--output_dir", str(tmp_path)])
    offer(monkeypatch, "shampoo4", lambda *_: Breaks(3))
    with pytest.raises(RuntimeError, match="no more steps"):
        benchmark.main(["modes", *TINY, "--only", "shampoo4", "--output_dir", str(tmp_path)])


def test_steps_without_a_refresh_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["modes", *TINY, "--steps", "1", "--only", "adamw", "--output_dir", str(tmp_path)])
    assert "less than an interval" in capsys.readouterr().out


@pytest.mark.parametrize("eager", [True, False])
def test_eager_compiles_nothing(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    class Compiles:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.parameters = parameters
            self.update = torch.compile(lambda tensor: tensor - 1, backend=backend)

        @torch.no_grad()
        def step(self) -> None:
            for parameter in self.parameters:
                parameter.copy_(self.update(parameter))

    choice = offer(monkeypatch, "compiles", lambda parameters, _: Compiles(parameters), compiles=True)
    flags = benchmark.parse(["modes", "--interval", "1", *(["--eager"] if eager else [])])
    contender = Contender(choice, [torch.zeros(3)], flags)
    contender.warm_up([[torch.zeros(3)]])
    contender.timed_step([[torch.zeros(3)]])
    assert contender.parameters[0].tolist() == [-5.0] * 3
    assert bool(compiled) != eager
    assert contender.row("compiles")["graph"] == ("eager" if eager else "compiled")


def test_what_compiles_slowly_is_eager_on_a_cpu() -> None:
    choice = Choice("slow", lambda *_: Breaks(0), compiles=True, slow_to_compile=True)
    for flags, eager in (([], True), (["--device", "cuda"], False), (["--eager"], True)):
        assert Contender(choice, [], benchmark.parse(["modes", *flags])).eager == eager


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "arguments are required: command"),
        (["modes", "--hidden_size", "100"], "multiples of 6, got 100"),
        (["modes", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["modes", "--only", "sgd"], "invalid choice: 'sgd'"),
        (["ranks"], "torchrun --nproc_per_node 2"),
        (["ranks", "--only", "shampoo4", "muon"], "invalid choice: 'muon'"),
        (["growth", "--parameters", "1e6", "0"], "--parameters must be at least 1"),
        (["growth", "--steps", "1"], "--steps must be at least 2, got 1"),
        (["scale", "--world_sizes", "8", "0"], "--world_sizes must be at least 1"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(flags)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 2, said


# -- peers -------------------------------------------------------------------------------------------------------------

INTERVALS = {
    "soap": ("pytorch_optimizer", "SOAP", "precondition_frequency"),
    "shampoo": ("pytorch_optimizer", "Shampoo", "preconditioning_compute_steps"),
    "scalable-shampoo": ("pytorch_optimizer", "ScalableShampoo", "preconditioning_compute_steps"),
    "heavyball-soap": ("heavyball", "SOAP", "precondition_frequency"),
    "meta-shampoo": ("distributed_shampoo", "DistributedShampoo", "precondition_frequency"),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_peers_are_given_the_interval(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind, option = INTERVALS[name]
    package: Any = types.ModuleType(module)
    setattr(package, kind, lambda parameters, **options: (parameters, options))
    package.AdamPreconditionerConfig = dict
    monkeypatch.setitem(sys.modules, module, package)
    assert CHOICES[name].why_missing() == ""
    given: Any = CHOICES[name].make([nn.Parameter(torch.zeros(2))], 17)
    assert len(given[0]) == 1 and given[1][option] == 17


def test_every_missing_peer_has_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PEERS) == 8
    for name in PEERS:
        monkeypatch.setitem(sys.modules, CHOICES[name].module, None)
        reason = CHOICES[name].why_missing()
        assert "Error: " in reason and CHOICES[name].module in reason
        assert CHOICES[name].install.startswith("pip install ")
    assert all(not choice.why_missing() for choice in CHOICES.values() if not choice.is_peer)


@pytest.mark.parametrize("name", PEERS)
def test_an_installed_peer_takes_steps(name: str) -> None:
    pytest.importorskip(CHOICES[name].module)
    gradients = [[torch.randn(72, 64), torch.randn(64)]]
    contender = Contender(CHOICES[name], gradients[0], benchmark.parse(["modes", "--eager", "--interval", "1"]))
    contender.warm_up(gradients)
    contender.timed_step(gradients)
    row = contender.row(name)
    assert all(parameter.any() for parameter in contender.parameters)
    assert row["state_bytes_per_parameter"] > 1 and row["version"] != "unknown"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "shampoo", "root_interval": 1},
        {"method": "shampoo", "root_interval": 1, "quantize": "preconditioner"},
        {"base": "sgd", "momentum": 0.9},
    ],
)
def test_state_bytes_of_ours_are_those_it_tells(options: dict[str, Any]) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((80, 70), (70,), (1, 9, 80))]
    optimizer = Shampoo4(parameters, statistics_interval=1, **options)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    apart = [tensor for p in parameters for tensor in (p, p.grad) if tensor is not None]
    told = sum(optimizer.state_bytes().values())
    assert 80 * 70 < told <= state_bytes(optimizer, apart) <= told + NORMS * 2


# -- on ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_train_and_tell_what_they_send(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    flags = ("--host", "fsdp2", "--steps", "3", "--only", "shampoo4", "--trace", tmp_path / "trace")
    ended = run_really(*torchrun, LAUNCH / "benchmark.py", "ranks", *TINY, *flags, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "torchao" not in ended.stderr and "Enum" not in ended.stderr, "no warnings of what is not measured"
    assert ended.stdout.count("fsdp2 on 2 ranks") == 1 and "Shampoo4, refresh" in ended.stdout
    rows = rows_of(tmp_path / "ranks.json")
    assert list(rows) == ["adamw", "shampoo4"]
    estimate, alone = (estimate_memory(tiny_shapes(), 2, host="fsdp2", precondition=own) for own in (True, False))
    ours = rows["shampoo4"]
    assert ours["sent_bytes"] == estimate.traffic and max(estimate.traffic) > 0
    assert ours["preconditioner_bytes"] == estimate.preconditioner
    assert ours["state_bytes"] == estimate.total and rows["adamw"]["state_bytes"] == alone.total
    assert ours["balance"] == pytest.approx(2 * max(estimate.preconditioner) / sum(estimate.preconditioner))
    assert 0 < ours["exchange_share"] < 1 and rows["adamw"]["exchange_share"] == 0
    for row in rows.values():
        assert row["step_ms"]["worst"] >= row["step_ms"]["median"] > row["optimizer_ms"]["median"] > 0

    # The parts of profiled steps, and the profiles.
    ordinary, refresh = ours["parts_ms"]["ordinary"], ours["parts_ms"]["refresh"]
    assert min(refresh.values()) >= 0 and ordinary["statistics"] == ordinary["roots"] == 0
    assert all(refresh[part] > 0 for part in ("gather", "statistics", "precondition", "send_back"))
    for spent in (ordinary, refresh):
        assert spent["step"] > spent["optimizer"] > spent["precondition"] + spent["base"] > 0
        assert spent["transfers"] > 0
    for rank in range(2):
        events = json.loads((tmp_path / f"trace/shampoo4-rank{rank}.json").read_text())["traceEvents"]
        assert len(parts_of(events)) == 2  # steps of an interval


# -- growth ------------------------------------------------------------------------------------------------------------


def test_growth_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--parameters", "5e4", "2e5", "--block_sizes", "64", "128", "--steps", "2")
    benchmark.main(["growth", *flags, "--output_dir", str(tmp_path)])
    assert "processor time" in capsys.readouterr().out
    rows = json.loads((tmp_path / "growth.json").read_text())["sizes"]
    hidden = [64, 64, 128, 128]
    assert [row["parameters"] for row in rows] == [12 * side**2 for side in hidden]
    assert [row["blocks"] for row in rows] == [4 + 2 * 4, 4 + 2 * 2, 4 * 4 + 2 * 16, 4 + 2 * 4]
    for row, limit in zip(rows, (64, 128, 64, 128), strict=True):
        shapes = {str(index): shape for index, shape in enumerate(stack_shapes(row["parameters"]))}
        estimate = estimate_memory(shapes, host="none", max_preconditioner_dim=limit)
        assert 0 <= row["state_bytes"]["shampoo4"] - estimate.total[0] <= NORMS * row["blocks"]
        assert estimate.base[0] == 0 and row["state_bytes"]["adamw"] == 8 * row["parameters"] + 4 * len(shapes)
        assert 0 < row["milliseconds"]["ordinary"] < row["milliseconds"]["refresh"]
        for kind, flops in row["flops"].items():
            spent = row["milliseconds"][kind] - (row["milliseconds"]["ordinary"] if kind == "refresh" else 0)
            assert row["gflops_per_second"][kind] == pytest.approx(flops / spent / 1e6)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
