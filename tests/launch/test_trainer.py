"""The Trainer on two processes: launches by torchrun of tests/trainer_script.py, under DDP, FSDP2 and ZeRO 2 and 3."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import forked
from support.launching import SCRIPTS
from support.marks import slow_except
from support.scripts.trainer_script import IN_32_BITS, INTERVALS, MOVES, PORTABLE, SAVED, STEPS, WAYS

Result = list[dict[str, Any]]  # of each process
CASES = [(host, way) for host, ways in WAYS.items() for way in ways]
QUICK = [("fsdp2", way) for way in WAYS["fsdp2"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Result]:
    """A function from a host and a way of saving to what its processes found. Launches are made when asked for."""
    base = tmp_path_factory.mktemp("trainer")

    def launch(name: str, host: str, processes: int) -> Result:
        (base / name).mkdir()
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        process = forked.run(*torchrun, SCRIPTS / "trainer_script.py", base / name, host, base)
        assert process.returncode == 0, process.stderr[-5000:]
        return json.loads((base / name / "result.json").read_text())

    @functools.cache
    def finished(name: str) -> Result:
        if name in WAYS:
            return launch(name, name, 2)
        for host in WAYS:
            finished(host)
        return launch(name, "moves", int(name.removeprefix("moves-")))

    return lambda host, way: [found[way] for found in finished(host)]


@pytest.mark.parametrize(("host", "way"), slow_except(QUICK, CASES))
def test_the_host_runs_that_was_asked_for(results: Callable[[str, str], Result], host: str, way: str) -> None:
    found = results(host, way)
    assert len(found) == 2
    for process in found:
        assert process["optimizer"] == "Shampoo4" and process["trains_the_model"]
        types = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}
        assert process["distributed_type"] == types[host.rstrip("123")]
        assert process["stage"] == {"zero2": 2, "zero3": 3}.get(host)
        assert process["wrapped_in_ddp"] is (host == "ddp")
        assert process["dtensors"] == (process["parameters"] if host == "fsdp2" else 0)
        assert process["state_bytes"]["preconditioner"] > 0, "every process has some of the preconditioners"
        # Saved whole where each process has all parameters: not without being collected first.
        assert ("consolidate_state_dict" in process["asked_for_states"]) is (host == "ddp")
        optimizer = {"own": "optimizer.pt", "FULL_STATE_DICT": "optimizer.bin", "SHARDED_STATE_DICT": "optimizer_0"}
        if way == PORTABLE:
            assert "shampoo4" in process["files"] and not {*optimizer.values(), "global_step9"} & {*process["files"]}
        else:
            assert (f"global_step{SAVED}" if host.startswith("zero") else optimizer[way]) in process["files"]


@pytest.mark.parametrize(("host", "way"), slow_except(QUICK, CASES))
def test_the_figures_of_the_optimizer_are_in_the_logs(
    results: Callable[[str, str], Result], host: str, way: str
) -> None:
    """By the callback LogOptimizer; the resumed run, which has none, goes on as this one."""
    found = results(host, way)
    own = ("optimizer_state_bytes", "optimizer_ms_per_step", "loss", "grad_norm")  # of the process
    for lines in zip(*(process["figures"] for process in found), strict=True):
        assert len({json.dumps({k: v for k, v in line.items() if k not in own}) for line in lines}) == 1
        assert all("loss" in line and line["optimizer_ms_per_step"] > 0 for line in lines)
    for process in found:
        assert len(process["figures"]) == STEPS
        assert process["figures"][-1]["optimizer_state_bytes"] == sum(process["state_bytes"].values())


@pytest.mark.parametrize(("host", "way"), slow_except(QUICK, CASES))
def test_the_losses_fall(results: Callable[[str, str], Result], host: str, way: str) -> None:
    for process in results(host, way):
        losses = [line["loss"] for line in process["full"]]
        assert len(losses) == STEPS
        assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


@pytest.mark.parametrize(("host", "way"), slow_except(QUICK, CASES))
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(
    results: Callable[[str, str], Result], host: str, way: str
) -> None:
    for process in results(host, way):
        assert [line["step"] for line in process["resumed"]] == list(range(1, STEPS + 1))
        assert process["resumed"][SAVED:] == process["full"][SAVED:], "losses and gradient norms, to the last digit"
        assert process["preconditioners"] > 0 and process["differences"] == []


@pytest.mark.slow
def test_all_hosts_train_the_same(results: Callable[[str, str], Result]) -> None:
    found = {(host, way): [line["loss"] for line in results(host, way)[0]["full"]] for host, way in CASES}
    first = INTERVALS["root_interval"]  # the losses of these steps do not know inverse roots
    for (host, _), losses in found.items():
        # Then up to 4-bit codes that the order of additions turns. Where DeepSpeed's configuration names the optimizer,
        # the Trainer makes no groups, and biases and norms are decayed too.
        close = 1e-3 if host.startswith("zero") else 1e-5
        assert losses[:first] == pytest.approx(found["ddp", "own"][:first], abs=close), host
        assert losses == pytest.approx(found["ddp", "own"], abs=1e-2), host
    ddp, fsdp2 = ([line["loss"] for line in results(host, IN_32_BITS)[0]] for host in ("ddp", "fsdp2"))
    assert len(ddp) == STEPS and fsdp2 == pytest.approx(ddp, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "move"), [(n, move) for n, moves in MOVES.items() for move in moves])
def test_a_run_goes_on_under_another_host_and_rank_count(
    results: Callable[[str, str], Result], processes: int, move: tuple[str, str]
) -> None:
    source, target = move
    full = results(source, PORTABLE)[0]["full"]
    found = results(f"moves-{processes}", f"{source} to {target}")
    assert len(found) == processes
    for lines in found:
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines[:SAVED] == full[:SAVED]
        assert lines[SAVED:] != full[SAVED:], "another order of additions"
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in full], abs=1e-2)


def test_an_offloaded_optimizer_stays_what_it_is(tmp_path: Path) -> None:
    """Accelerate gives DeepSpeed its own Adam for the CPU instead, unless it is told otherwise."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1)
    process = forked.run(*torchrun, SCRIPTS / "offloaded_trainer.py", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "runs Shampoo4" in process.stdout
