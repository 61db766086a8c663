"""Runs beside each other: one table and page over several run folders, and the same prompts to every model of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distill.api.open_run import OpenRun, load_run, open_run
from distill.core.errors import InputError
from distill.core.run_folder import Run
from distill.core.source import flat
from distill.recipe import Recipe
from distill.reporting.tables import markdown_table
from distill.reporting.task_scores import TaskScores, merged
from distill.reporting.task_tables import markdown_rows
from distill.reporting.tradeoff import Row
from distill.reporting.verdict import main_student
from distill.stages.chat import prompts_of, template_of
from distill.stages.evaluate.stored_rows import measured_text
from distill.stages.text import spoken


def report_runs(folders: list[Path], out: Path) -> tuple[str, Path]:
    """One report over the measured models of several runs, the best run first.

    Args:
        folders: run folders; with more than one, a model is called ``run/model``.
        out: folder of the report.

    Returns:
        The tables as Markdown (models; keys in which the recipes differ), and the path of ``index.html``.

    Raises:
        InputError: a folder is no run, or has measured nothing yet.
    """
    from distill.reporting.write_report import RunFacts, write_report

    runs = dict(zip(_prefixes(folders), _comparable(folders), strict=True))
    runs = dict(sorted(runs.items(), key=lambda one: _loss(one[1])))
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    scores: list[TaskScores] = []
    for prefix, run in runs.items():
        known = {row.name for row in run.rows if row.role != "teacher"}
        rows += [_renamed(row, prefix, known) for row in run.rows if row.role != "teacher" or not rows]
        scores.append(run.tasks.renamed({name: prefix + name for name in known}))
        curves |= {prefix + name: series for name in run.stages if (series := run.curves(name))}
    notes = [note for run in runs.values() for note in run.notes]
    keys = differing({prefix.removesuffix("/"): run.recipe for prefix, run in runs.items()})
    facts = RunFacts(
        name=" and ".join(run.folder.name for run in runs.values()),
        recipe="\n---\n".join(run.recipe.dump() for run in runs.values()),
        command=f"distill report {' '.join(str(folder) for folder in folders)}",
        device=", ".join(dict.fromkeys(row.device for row in rows if row.device)),
        engine=", ".join(dict.fromkeys(row.engine for row in rows if row.engine)),
        notes=[*(f"the runs differ in {key}: {', '.join(map(str, values))}" for key, *values in keys), *notes],
    )
    page = write_report(rows, curves, [], facts, out, scores=merged(scores))
    table = markdown_rows([["Differing keys", *(prefix.removesuffix("/") for prefix in runs)], *keys]) if keys else ""
    return "\n".join(filter(None, [markdown_table(rows), table, *notes])), page


def differing(recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """The keys in which recipes differ, but for their names, each followed by its value in each recipe.

    Args:
        recipes: name of the run -> its recipe.
    """
    values = [flat(yaml.safe_load(recipe.dump())) for recipe in recipes.values()]
    keys = [key for key in dict.fromkeys(key for one in values for key in one) if key != "name"]
    shown = [[key, *("unset" if (got := one.get(key)) is None else str(got) for one in values)] for key in keys]
    return [line for line in shown if len(set(line[1:])) > 1]


def _loss(run: OpenRun) -> float:
    """What the student of a run loses, in bits per byte where they are measured; infinite where nothing is."""
    student = main_student(run.rows)
    if student is None or student.loss_nats is None:
        return math.inf
    return student.loss_nats if student.bits_per_byte is None else student.bits_per_byte


def _comparable(folders: list[Path]) -> list[OpenRun]:
    """Runs that were measured on the same text against the same teacher.

    Raises:
        InputError: they were not, so that no figure of one says anything beside the other's.
    """
    runs = [open_run(folder) for folder in folders]
    recipes = [run.recipe for run in runs]
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
    for run in runs:
        if not run.rows:
            raise InputError(f"{run.folder}: nothing is measured in this run yet; it needs a finished evaluate stage")
    return runs


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


def _renamed(row: Row, prefix: str, known: set[str]) -> Row:
    def of_run(name: str | None) -> str | None:
        return prefix + name if name is not None and name in known else name

    own, run = str(of_run(row.name)), prefix.removesuffix("/")
    return replace(row, name=own, run=run, parent=of_run(row.parent), baseline=of_run(row.baseline))
