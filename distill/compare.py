"""Runs beside each other: one table and page over several run folders, and the same prompts to every model of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.core.errors import InputError
from distill.core.run import RECIPE, Run
from distill.recipe import Recipe
from distill.reporting.task_scores import TaskScores, merged
from distill.reporting.tradeoff import Row
from distill.stages.chat import prompts_of, template_of
from distill.stages.evaluate.rows import measured_text, rows_of, scores_of
from distill.stages.text import spoken


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
    from distill.reporting.tables import markdown_table
    from distill.reporting.write import RunFacts, write_report
    from distill.stages.report.left import Left, loss_curves

    recipes = _comparable(folders)
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    scores: list[TaskScores] = []
    notes: list[str] = []
    for prefix, folder, recipe in zip(_prefixes(folders), folders, recipes, strict=True):
        found = _rows(folder, recipe)
        known = {row.name for row in found if row.role != "teacher"}
        rows += [_renamed(row, prefix, known) for row in found if row.role != "teacher" or not rows]
        scores.append(scores_of(Run(folder), recipe.stages).renamed({name: prefix + name for name in known}))
        left = Left(Run(folder))
        curves |= {prefix + name: series for name, series in loss_curves(left, recipe.stages).items()}
        notes += left.notes
    facts = RunFacts(
        name=" and ".join(folder.name for folder in folders),
        recipe="\n---\n".join(recipe.dump() for recipe in recipes),
        command=f"distill report {' '.join(str(folder) for folder in folders)}",
        device=", ".join(dict.fromkeys(row.device for row in rows if row.device)),
        engine=", ".join(dict.fromkeys(row.engine for row in rows if row.engine)),
        notes=notes,
    )
    page = write_report(rows, curves, [], facts, out, scores=merged(scores))
    return "\n".join([markdown_table(rows), *notes]), page


def _comparable(folders: list[Path]) -> list[Recipe]:
    """The recipes of runs that were measured on the same text against the same teacher.

    Raises:
        InputError: they were not, so that no figure of one says anything beside the other's.
    """
    recipes = [load_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("report: a run folder is given twice; name each once")
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        texts = [measured_text(one.stages, one.data) for one in (recipe, recipes[0])]
        for what, differ in (("teacher", recipe.teacher != recipes[0].teacher), ("data", texts[0] != texts[1])):
            if differ:
                raise InputError(
                    f"report: {folder} and {folders[0]} differ in {what}, so their figures cannot be compared; "
                    "report each on its own"
                )
        if other := _other_tasks(recipes[0], recipe):
            raise InputError(
                f"report: {folder} and {folders[0]} call different tasks {other[0]}, so their scores cannot be "
                "compared; report each on its own"
            )
    return recipes


def _other_tasks(one: Recipe, other: Recipe) -> list[str]:
    """Names under which two recipes ask different things."""
    ours, theirs = (
        {name: task for stage in recipe.stages.values() for name, task in getattr(stage, "tasks", {}).items()}
        for recipe in (one, other)
    )
    return [name for name in ours if name in theirs and ours[name] != theirs[name]]


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
    from distill.training.trainer import dtype_on, resolve_device

    recipe, run = load_run(folder), Run(folder)
    models = {"teacher": locate(recipe.teacher)} if recipe.teacher else {}
    for name, stage in recipe.stages.items():
        if stage.makes_model and (done := run.done(name)) is not None:
            run.check(name, str(stage.result(done.figures)))
            models[name] = run.model(name).location
    if not models:
        raise InputError(f"{folder}: no model is finished in this run; run it first")
    device = resolve_device(recipe.compute)
    text = spoken(recipe.stages, recipe.data)
    template = template_of(text, recipe.stages, lambda name: locate(str(recipe.teacher) if name == "teacher" else name))
    return side_by_side(
        models,
        prompts,
        new_tokens=new_tokens,
        device=device,
        dtype=dtype_on(device),
        simulated=[name for name, location in models.items() if low_bit_scheme(load_config(location))],
        encode=prompts_of(text, template),
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
    found = rows_of(Run(folder), recipe.stages)
    if not found:
        raise InputError(f"{folder}: nothing is measured in this run yet; it needs a finished evaluate stage")
    return found


def _renamed(row: Row, prefix: str, known: set[str]) -> Row:
    def of_run(name: str | None) -> str | None:
        return prefix + name if name is not None and name in known else name

    return replace(row, name=str(of_run(row.name)), parent=of_run(row.parent), baseline=of_run(row.baseline))
