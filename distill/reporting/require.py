"""The ``require`` section of a recipe: bounds on measured figures, such as ``arc_easy: ">= 0.97 of teacher"``.

    expression = comparison number [%] [of MODEL]          ">= 0.97 of teacher", "<= 1.05 of teacher", ">= 60 %", "< 30"
    key        = [MODEL/]FIGURE                            perplexity, int4/perplexity, arc_easy, arc_easy.recovery

A figure is a column of the table or a task. For a task, its accuracy (0 to 1) or the value named after the dot is
compared. Without a model, the figure of the last student is compared; the figure of an export needs its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distill.reporting.tables import BY_KEY, significant
from distill.reporting.task_scores import TaskScores
from distill.reporting.tradeoff import Row, figure

EXPRESSION = re.compile(r"(>=|<=|>|<)\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%)?(?:\s+of\s+(\S+))?")
OF_TASK = ("accuracy", "normalized_accuracy", "recovery")
"""Values of a task that can be named after the dot."""
Comparison = Literal[">=", "<=", ">", "<"]


@dataclass(frozen=True)
class Bound:
    """A parsed expression.

    Attributes:
        comparison: between the figure and its limit.
        number: the limit, or a factor; percentages are divided by 100.
        of: model whose figure times ``number`` is the limit; None: ``number`` is the limit.
    """

    comparison: Comparison
    number: float
    of: str | None = None

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value satisfies the comparison with its limit."""
        return {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}[self.comparison]


@dataclass(frozen=True)
class Outcome:
    """Result of one requirement.

    Attributes:
        key: key in the recipe.
        wanted: the expression.
        reached: whether the figure was measured and satisfies the bound.
        said: explanation with the values.
    """

    key: str
    wanted: str
    reached: bool
    said: str

    @property
    def line(self) -> str:
        """For the end of a run."""
        return f"require.{self.key}: {self.wanted} is not reached: {self.said}"


def parsed(expression: str) -> Bound:
    """Parse an expression.

    Raises:
        ValueError: it is not valid.
    """
    found = EXPRESSION.fullmatch(expression.strip())
    if found is None:
        raise ValueError(
            f"{expression!r} is no bound; write a comparison, a number and, if it is a share of a model's figure, that "
            'model: ">= 0.97 of teacher", "<= 1.05 of teacher", ">= 0.6"'
        )
    comparison, number, percent, of = found.groups()
    return Bound(comparison, float(number) / (100 if percent else 1), of)  # type: ignore[arg-type]


def split_key(key: str) -> tuple[str | None, str]:
    """(model or None, figure)."""
    model, slash, name = key.rpartition("/")
    return (model if slash else None), name


def figure_name(name: str, measured: Sequence[str]) -> str | None:
    """The column or task that ``name`` refers to; None if it is not measured."""
    if name in measured:
        return name
    task, dot, what = name.rpartition(".")
    return task if dot and what in OF_TASK and task in measured else None


def outcomes(require: Mapping[str, str], rows: Sequence[Row], scores: TaskScores) -> list[Outcome]:
    """Compare the figures with all requirements, in the recipe's order.

    Args:
        require: key -> expression, both valid.
        rows: measured models, in the order of the run.
        scores: scores of these models on tasks.
    """
    students = [row.name for row in rows if row.role == "student" and not row.is_file]
    found = []
    for key, expression in require.items():
        bound, (model, name) = parsed(expression), split_key(key)
        model = model if model is not None else students[-1] if students else None
        found.append(Outcome(key, expression, *_judged(bound, model, name, rows, scores)))
    return found


def _judged(bound: Bound, model: str | None, name: str, rows: Sequence[Row], scores: TaskScores) -> tuple[bool, str]:
    if model is None:
        return False, "no student was measured"
    value = _value(model, name, rows, scores)
    if value is None:
        return False, f"{name} of {model} was not measured"
    if bound.of is None:
        limit, what = bound.number, significant(bound.number, 4)
    else:
        whole = _value(bound.of, name, rows, scores)
        if whole is None:
            return False, f"{name} of {bound.of} was not measured"
        limit = bound.number * whole
        what = f"{significant(limit, 4)} ({significant(bound.number, 4)} of {bound.of}'s {significant(whole, 4)})"
    return bound.holds(value, limit), f"{model} has {significant(value, 4)}, {bound.comparison} {what} is required"


def _value(model: str, name: str, rows: Sequence[Row], scores: TaskScores) -> float | None:
    row = next((row for row in rows if row.name == model), None)
    if row is not None and name in BY_KEY:
        return figure(row, name)
    task, _, what = name.rpartition(".")
    if (score := scores.of(model, name)) is not None:
        return score.compared
    score = scores.of(model, task)
    return getattr(score, what) if score is not None and what in OF_TASK else None
