"""The notebook runs in a kernel of its own, with two steps and few notes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.notebook import NOTEBOOKS, page_of

# What is shorter here than for a reader.
SHORTER = {
    "STEPS = 100": "STEPS = 2",
    "400 --num_valid 100 --num_test 200": "60 --num_valid 24 --num_test 24",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    for old, new in SHORTER.items():
        [cell] = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    commands = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", commands + os.pathsep + os.environ["PATH"])
    settings = {"resources": {"metadata": {"path": str(tmp_path)}}, "timeout": 600}
    nbclient.NotebookClient(notebook, kernel_name="python3", **settings).execute()
    assert (tmp_path / "runs" / "probe" / "leaderboard.md").is_file()
    # A command in a cell that fails does not fail the cell.
    outputs = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "Traceback" not in outputs
    assert "image/png" in outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_results(path: Path):
    import json

    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_page_of_a_notebook_shows_its_cells(path: Path):
    page = path.with_suffix(".md").read_text()
    assert page == page_of(path), "run `python -m tests.docs.notebook`"
