"""Scores on tasks as rows of cells: for the page, for Markdown and for W&B."""

from __future__ import annotations

from collections.abc import Sequence

from distill.core.markdown import escaped
from distill.reporting.tables import MISSING
from distill.reporting.task_scores import Pair, Score, TaskScores

MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"


def points(share: float, *, sign: bool = False) -> str:
    """A share, or a difference of two, in percentage points with a digit."""
    value = round(100 * share, 1) or 0.0
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return text.replace("-", MINUS)


def p_text(p: float) -> str:
    """A p value: as small as it is of use to know."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def score_rows(scores: TaskScores) -> list[list[str]]:
    """Headings, then a row per task and model."""
    found = [["Task", "Model", "Questions", "Accuracy [%]", "Normalised [%]", "Chance [%]", "Kept of the teacher [%]"]]
    for task in scores.tasks:
        for model in scores.models:
            if (score := scores.of(model, task)) is not None:
                found.append([task, model, f"{score.items:,}", *_figures(score)])
    return found


def _figures(score: Score) -> list[str]:
    kept = MISSING
    if score.recovery is not None:
        kept = f"{points(score.recovery)}{_error(score.recovery_error)}"
    return [
        f"{points(score.accuracy)}{_error(score.standard_error)}",
        MISSING
        if score.normalized_accuracy is None
        else f"{points(score.normalized_accuracy)}{_error(score.normalized_standard_error)}",
        points(score.chance) if score.chance else MISSING,
        kept,
    ]


def _error(error: float | None) -> str:
    return "" if error is None else f" {PLUS_MINUS} {points(error)}"


def pair_rows(scores: TaskScores) -> list[list[str]]:
    """Headings, then a row per pair of models and task."""
    headings = ["Models", "Task", "Difference [points]", "95 % interval", "Lost", "Gained", "Other answers [%]", "p",
                "p (Holm)", "Detectable difference [points]", "Finding"]  # fmt: skip
    return [headings, *(_pair(pair) for pair in scores.pairs)]


def _pair(pair: Pair) -> list[str]:
    return [
        f"{pair.first} \N{RIGHTWARDS ARROW} {pair.second}",
        pair.task,
        points(pair.difference, sign=True),
        f"{points(pair.low, sign=True)} to {points(pair.high, sign=True)}",
        str(pair.lost),
        str(pair.gained),
        points(pair.changed),
        p_text(pair.p),
        p_text(pair.p_holm),
        points(pair.smallest),
        finding(pair),
    ]


def finding(pair: Pair) -> str:
    """What the questions show, in a word or two."""
    if not pair.is_shown:
        return "no difference shown"
    return "better" if pair.difference > 0 else "worse"


def task_lines(scores: TaskScores) -> list[str]:
    """Lines for a terminal: each score, then each note."""
    lines = []
    for task in scores.tasks:
        for model in scores.models:
            if (score := scores.of(model, task)) is not None:
                error = "" if score.standard_error is None else f" {PLUS_MINUS} {points(score.standard_error)}"
                normal = score.normalized_accuracy
                more = "" if normal is None else f"  normalised {points(normal)} %"
                lines.append(f"{model:<24} {task}: {points(score.accuracy)}{error} % of {score.items:,}{more}")
    return [*lines, *scores.notes]


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows, headings first."""
    head, *body = ["| " + " | ".join(map(escaped, cells)) + " |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
