"""Runs beside each other: one table and page over several run folders, and the same prompts to every model of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.core.errors import InputError
from distill.core.run import RECIPE, Run
from distill.recipe import Recipe
from distill.stages.evaluate import ROWS
from distill.tracking.tradeoff import Row, from_json


def report_runs(folders: list[Path], out: Path) -> tuple[str, Path]:
    """One report over the measured models of several runs.

    Args:
        folders: run folders; with more than one, a model is called ``run/model``.
        out: folder of the report.

    Returns:
        The table as Markdown, and the path of ``index.html``.

    Raises:
        InputError: a folder is no run, or has measured nothing yet.
    """
    from distill.stages.report_page.write import RunFacts, write_report
    from distill.tracking.tables import markdown_table

    recipes = _comparable(folders)
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    for prefix, folder, recipe in zip(_prefixes(folders), folders, recipes, strict=True):
        found = _rows(folder, recipe)
        known = {row.name for row in found if row.role != "teacher"}
        rows += [_renamed(row, prefix, known) for row in found if row.role != "teacher" or not rows]
        curves |= {prefix + name: series for name, series in _curves(folder, recipe).items()}
    facts = RunFacts(
        name=" and ".join(folder.name for folder in folders),
        recipe="\n---\n".join(recipe.dump() for recipe in recipes),
        command=f"distill report {' '.join(str(folder) for folder in folders)}",
        device=", ".join(dict.fromkeys(row.device for row in rows if row.device)),
        engine=", ".join(dict.fromkeys(row.engine for row in rows if row.engine)),
    )
    return markdown_table(rows), write_report(rows, curves, [], facts, out)


def _comparable(folders: list[Path]) -> list[Recipe]:
    """The recipes of runs that were measured on the same text against the same teacher.

    Raises:
        InputError: they were not, so that no figure of one says anything beside the other's.
    """
    recipes = [load_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("report: a run folder is given twice; name each once")
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        for what in ("teacher", "data"):
            if getattr(recipe, what) != getattr(recipes[0], what):
                raise InputError(
                    f"report: {folder} and {folders[0]} differ in {what}, so their figures cannot be compared; "
                    "report each on its own"
                )
    return recipes


def _prefixes(folders: list[Path]) -> list[str]:
    """What tells the runs' models apart: nothing for one run, the folder's name, or its path where names are equal."""
    if len(folders) == 1:
        return [""]
    names = [folder.name for folder in folders]
    return [f"{folder.name if names.count(folder.name) == 1 else folder}/" for folder in folders]


def answer_prompts(folder: Path, prompts: list[str], *, new_tokens: int) -> list[dict[str, Any]]:
    """The same prompts to the teacher and every model that a run has made; see ``evaluation.side_by_side``.

    Raises:
        InputError: the folder is no run, or no model is finished in it.
    """
    from distill.evaluation.side_by_side import side_by_side
    from distill.models.load import load_config, locate, low_bit_scheme
    from distill.training.trainer import resolve_device

    recipe, run = load_run(folder), Run(folder)
    models = {"teacher": locate(recipe.teacher)} if recipe.teacher else {}
    models |= {n: run.model(n).location for n, stage in recipe.stages.items() if stage.makes_model and run.done(n)}
    if not models:
        raise InputError(f"{folder}: no model is finished in this run; run it first")
    device = resolve_device(recipe.compute)
    return side_by_side(
        models,
        prompts,
        new_tokens=new_tokens,
        device=device,
        dtype="auto" if device == "cuda" else "float32",
        simulated=[name for name, location in models.items() if low_bit_scheme(load_config(location))],
    )


def load_run(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        InputError: it is not a run folder.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: not a run folder (no {RECIPE} in it)")
    return Recipe.load(folder / RECIPE)


def _rows(folder: Path, recipe: Recipe) -> list[Row]:
    found: dict[str, Row] = {}
    for name, stage in recipe.stages.items():
        file = folder / name / ROWS
        if stage.kind == "evaluate" and file.is_file():
            found |= {row.name: row for row in from_json(file.read_text())}
    if not found:
        raise InputError(f"{folder}: nothing is measured in this run yet; it needs a finished evaluate stage")
    return list(found.values())


def _renamed(row: Row, prefix: str, known: set[str]) -> Row:
    parent = prefix + row.parent if row.parent in known else row.parent
    return replace(row, name=prefix + row.name if row.name in known else row.name, parent=parent)


def _curves(folder: Path, recipe: Recipe) -> dict[str, Any]:
    from distill.stages.report import loss_curves

    return loss_curves(Run(folder), recipe.stages)
