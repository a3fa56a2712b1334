"""Every host computes the recorded bits, and the files of an early version load and continue with them.

A failure means that this version computes other numbers. If it is meant to, run ``make golden`` and say so in the
commit's message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from support.contract import CASES
from support.golden import DIGESTS, GOLDEN
from support.training import ALL

QUICK = ("mlp, blocks", "vit, blocks, remainder", "tied, groups", "mlp, blocks, compact", "experts, heads, soap")


@cache
def recorded() -> dict[str, Any]:
    return json.loads(DIGESTS.read_text())


def found(world_size: int, cases: tuple[str, ...], file_hosts: tuple[str, ...]) -> dict[str, Any]:
    """What this version computes, in processes whose kernels all x86 CPUs share."""
    flags = ["--worlds", str(world_size), "--cases", *cases, "--file_hosts", *file_hosts]
    command = [sys.executable, str(GOLDEN / "digests.py"), *flags]
    # A process of its own: its ranks need not load what those of pytest-xdist load.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    if result["probe"] != recorded()["probe"]:
        pytest.skip(
            f"this machine's arithmetic is not that of the recorded digests (probe {result['probe']}, recorded "
            f"{recorded()['probe']} with torch {recorded()['torch']}): compare two versions here with "
            "tests/golden/digests.py --worlds 2 3"
        )
    return result


def differences(expected: dict[str, str], actual: dict[str, str]) -> list[str]:
    """What differs of a case, and from which step on."""
    told = [name for name in expected if expected[name] != actual[name] and name != "directions"]
    pairs = zip(expected["directions"].split(), actual["directions"].split(), strict=True)
    steps = [step for step, (first, second) in enumerate(pairs, 1) if first != second]
    return told + ([f"directions of steps {steps}"] if steps else [])


def check(world_size: int, cases: tuple[str, ...], file_hosts: tuple[str, ...]) -> None:
    result = found(world_size, cases, file_hosts)
    by_host = {**result["alone"], **result["worlds"][str(world_size)]}
    assert by_host.keys() == {"plain", "zero", *ALL}
    wrong = {}
    for host, by_case in by_host.items():
        assert by_case.keys() == set(cases)
        expected = recorded()["cases"]["zero" if host.startswith("zero") else "plain"]
        wrong |= {(host, case): differences(expected[case], actual) for case, actual in by_case.items()}
    assert not any(wrong.values()), {key: value for key, value in wrong.items() if value}
    for size, by_file in result["files"].items():
        for file, actual in by_file.items():
            assert actual == recorded()["files"], (size, file)
    assert len(result["files"][str(world_size)]) == len(file_hosts) + ("ddp" in file_hosts)


def test_some_cases_under_every_host() -> None:
    check(3, QUICK, ALL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_other_cases_under_every_host() -> None:
    """Other numbers of ranks: test_contract.py."""
    check(3, tuple(case for case in CASES if case not in QUICK), ALL)


def test_every_case_is_recorded() -> None:
    assert [list(cases) for cases in recorded()["cases"].values()] == [list(CASES)] * 2
