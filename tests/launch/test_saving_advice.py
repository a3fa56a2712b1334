"""One warning at the first step where a Trainer or an Accelerator will fail to save, and none elsewhere."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from support import forked
from support.launching import SCRIPTS
from support.scripts.saving_script import SILENT, WARNS, Net, train

from sharded_shampoo4 import Shampoo4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The warnings and errors of both ranks, by way."""
    folder = tmp_path_factory.mktemp("saving")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    process = forked.run(*torchrun, SCRIPTS / "saving_script.py", folder)
    assert process.returncode == 0, process.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_warning_before_a_checkpoint_fails(results: list[dict[str, Any]]) -> None:
    main, other = results
    for way in WARNS:
        (warning,) = main[way][0]
        assert not other[way][0], "only the main process warns"
        names = ("PortableTrainer", "ConsolidateStates()") if "Trainer" in way else ("PortableAccelerator",)
        assert all(name in warning for name in names)
    for rank in results:
        assert "consolidate_state_dict() on every rank" in rank["Accelerator"][1], "the warning was right"


@pytest.mark.parametrize("way", SILENT)
def test_no_warning_where_states_can_be_saved(results: list[dict[str, Any]], way: str) -> None:
    for rank in results:
        assert rank[way] in ([[], None], [[], ""])


def test_no_warning_in_one_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True), Net()
    model, optimizer = accelerator.prepare(model, Shampoo4(model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, accelerator.backward)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
