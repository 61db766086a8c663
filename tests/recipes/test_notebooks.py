"""Every notebook runs from its first cell to its last, in this process, and was committed with small outputs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest

import distill
from distill.core.errors import InputError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(file: Path, names: dict[str, Any]) -> list[Any]:
    """Run the cells of a notebook one after the other; what the last line of each gives, as a notebook shows it.

    Args:
        file: the notebook.
        names: its namespace, which is filled.
    """
    shown = []
    for number, cell in enumerate(nbformat.read(file, as_version=4).cells):
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source, f"{file.name}, cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, file.name, "exec"), names)  # a notebook of this repository
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), file.name, "eval"), names))
    return shown


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """What the first notebook shows, and the folder of its run, which the others read."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        matplotlib.use("agg", force=True)
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("first")))
        shown = execute(NOTEBOOKS[0], names)
    return shown, names["folder"]


SHORT = "03_your_own_loss_and_trainer"
"""The notebook that every run of the tests executes; ``make test-all`` executes all."""


@pytest.mark.parametrize(
    "file",
    [file if file.stem == SHORT else pytest.param(file, marks=pytest.mark.exhaustive) for file in NOTEBOOKS],
    ids=lambda file: file.stem,
)
def test_a_notebook_runs(
    file: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: list[Any] = []
    if file.stem != SHORT:
        shown, folder = request.getfixturevalue("first")
        monkeypatch.setenv("DISTILL_RUN", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("DISTILL_CHAT_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    if file != NOTEBOOKS[0]:
        shown = execute(file, {})
    tables = [one._repr_markdown_() for one in shown if hasattr(one, "_repr_markdown_")]
    assert any("| teacher |" in table for table in tables) is (file.stem != "02_prune_and_look")
    assert matplotlib.pyplot.get_fignums() or any(hasattr(one, "_repr_png_") for one in shown)
    matplotlib.pyplot.close("all")


def test_notebooks_are_kept_with_small_outputs() -> None:
    assert len(NOTEBOOKS) == 6
    for file in NOTEBOOKS:
        assert file.stat().st_size < 200_000, f"{file.name}: run notebooks/execute.py, which makes pictures small"
        text = file.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert "/tmp/" not in text
        cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert [output for output in outputs if output.output_type == "error"] == []
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1, file.name


@pytest.mark.exhaustive  # it runs the first notebook
def test_a_run_is_read_without_an_import_from_inside(first: tuple[list[Any], Path]) -> None:
    _, finished = first
    opened = distill.open_run(finished)
    assert list(opened.stages) == ["prune", "distill", "ce", "int4", "evaluate", "report"]
    assert all(opened.is_finished(stage) and opened.seconds(stage) >= 0 for stage in opened.stages)
    assert [row.name for row in opened.rows] == ["teacher", "prune", "distill", "ce", "int4"]
    assert opened.verdict.startswith("distill: ")
    curve = opened.curves("distill")
    assert curve["train/forward_kl"][-1][0] == opened.figures("distill")["training_tokens"]
    assert "val/kl" in curve
    assert opened.curves("prune") == {}
    plan, scores = opened.plan(), opened.scores()
    assert plan.after["mlp_neurons"] * 2 == plan.before["mlp_neurons"]
    assert scores.mlp_neurons is not None
    assert scores.mlp_neurons.shape == (plan.before["layers"], plan.before["mlp_neurons"])
    ((prompt, answers), *_) = opened.answers()
    assert prompt == "The try statement "
    assert list(answers) == ["teacher", "distill", "int4"]
    model, _ = distill.load(str(opened.model("distill")))
    assert model.config.intermediate_size == plan.after["mlp_neurons"]
    assert opened.page().is_file()
    assert opened.tasks.scores == ()
    assert opened.notes == []
    for call, said in (
        (lambda: opened.curves("distil"), "no stage 'distil'"),
        (lambda: opened.plan("distill"), "left no plan.json"),
        (lambda: opened.model("evaluate"), "makes no model"),
        (lambda: distill.open_run(finished.parent), "not a run folder"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    (finished / "report" / "answers.json").write_text("[]")
    with pytest.raises(InputError, match="is not what stage report made"):
        distill.open_run(finished).answers()
