"""The rows, and the scores on tasks, that the evaluate stages of a run have measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from distill.core.run_folder import Run
from distill.data.spec import DataSpec
from distill.reporting.task_scores import TaskScores, merged, read_scores
from distill.reporting.tradeoff import Row, read_rows
from distill.stages.base import StageSpec
from distill.stages.text import data_of

if TYPE_CHECKING:
    from distill.stages.session import StageContext

ROWS = "rows.json"
SCORES = "tasks.json"


def measured_rows(context: StageContext) -> list[Row]:
    """The rows of the evaluate stages before this one; see :func:`rows_of`."""
    names = list(context.session.stages)
    return rows_of(context.session.run, names[: names.index(context.name)])


def rows_of(run: Run, names: Iterable[str]) -> list[Row]:
    """The rows of a run's finished evaluate stages; a model that was measured twice counts once, the last time.

    Figures on two texts say nothing beside each other: only the stages count that measured on that of the last one.

    Args:
        run: the run folder.
        names: of the stages to look at.

    Raises:
        InputError: a file of rows is gone, has changed since it was written, or holds no rows.
    """
    found: dict[str, Row] = {}
    same, _ = by_text(run, names)
    for name in same:
        if (file := run.result(name, ROWS)) is not None:
            found |= {row.name: row for row in read_rows(file)}
    return list(found.values())


def measured_text(stages: Mapping[str, StageSpec], data: DataSpec) -> DataSpec:
    """The text that the last evaluate stage of a recipe measures on.

    Args:
        stages: of the recipe.
        data: the recipe's own section.
    """
    names = [name for name, stage in stages.items() if stage.kind == "evaluate"]
    return data_of(stages, data, names[-1]) if names else data


def by_text(run: Run, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The finished evaluate stages that measured on the text of the last one, and those on another text."""
    every = {name: done for name in names if (done := run.done(name)) is not None and ROWS in done.files}
    found = {name: done for name, done in every.items() if "models" in done.figures}  # a report has rows too
    texts = {name: done.figures.get("text") for name, done in found.items()}
    last = next(reversed(texts.values()), None)
    return [name for name in texts if texts[name] == last], [name for name in texts if texts[name] != last]


def scores_of(run: Run, names: Iterable[str]) -> TaskScores:
    """The scores on tasks of a run's finished evaluate stages; what was measured twice counts once, the last time.

    Args:
        run: the run folder.
        names: of the stages to look at.

    Raises:
        InputError: a file of scores is gone, has changed since it was written, or holds no scores.
    """
    return merged([read_scores(file) for name in names if (file := run.result(name, SCORES)) is not None])
