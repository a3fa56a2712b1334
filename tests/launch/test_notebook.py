"""The notebook of launch/examples, executed from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.launching import LAUNCH

nbclient = pytest.importorskip("nbclient", reason="make test-peers installs it")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = LAUNCH / "examples" / "shampoo4.ipynb"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def printed(notebook: Any) -> list[str]:
    """Return what each cell has written."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


@pytest.mark.slow
def test_the_notebook_runs_and_writes_what_is_stored(tmp_path: Path) -> None:
    """Compare what each cell writes with the stored output. `jupyter execute --inplace` updates the file."""
    stored = printed(nbformat.read(NOTEBOOK, as_version=4))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": tmp_path}}).execute()
    streams = {output.name for cell in notebook.cells for output in cell.get("outputs", ()) if "name" in output}
    assert streams == {"stdout"}, "nothing is written to stderr"
    for found, told in zip(printed(notebook), stored, strict=True):
        assert NUMBER.sub("#", found) == NUMBER.sub("#", told)
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, told)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
