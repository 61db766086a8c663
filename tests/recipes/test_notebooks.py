"""Every notebook runs from its first cell to its last on a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from distill.recipe import Recipe
from distill.runner import run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_reads_a_run(
    file: Path, shrink: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ROOT / "recipes" / "cross-entropy-control.yaml"
    finished = run(Recipe.load(recipe, shrink(recipe)), tmp_path / "run", say=lambda line: None)
    monkeypatch.setenv("DISTILL_RUN", str(finished.folder))
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_notebooks_are_kept_without_outputs() -> None:
    assert NOTEBOOKS
    for file in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        assert [cell.outputs for cell in cells] == [[] for _ in cells]
