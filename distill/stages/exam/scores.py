"""What a model has answered, as numbers, and the comparison of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from distill.numerics.statistics import Paired, PairedMeans, holm
from distill.stages.synthesize.exam_spec import CONTROL, TRAINED, Question

CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True)
class Given:
    """The answer of a model to one question.

    Attributes:
        nats: mean negative log-likelihood of the reference answer, in nats per token.
        text: what the model wrote.
        f1: token F1 of the text and the reference, 0 to 1; None if nothing was to be written.
        numbers: share of the numbers of the reference that the text has; None if it has none.
        grade: of a judge, 1 to 5; None without a judge, or if it gave none.
        is_cut: whether the question, with its document, was longer than the model's context, so that its beginning was
            left out.
        chosen_right: whether the likeliest choice (per token) is the right one; None without choices.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    nats: float
    text: str
    f1: float | None
    numbers: float | None = None
    chosen_right: bool | None = None
    grade: int | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class Sitting:
    """One model with a closed or an open book.

    Attributes:
        answers: one per question, in their order.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    answers: tuple[Given, ...]


def row_of(model: str, book: str, group: str, answers: Sequence[Given]) -> dict[str, Any]:
    """Mean scores of a model on a group of questions, each with its standard error."""
    row: dict[str, Any] = {"model": model, "book": book, "group": group, "questions": len(answers)}
    columns: dict[str, Callable[[Given], float | bool | None]] = {
        "nats": lambda one: one.nats,
        "f1": lambda one: one.f1,
        "numbers": lambda one: one.numbers,
        "choice": lambda one: one.chosen_right,
        "grade": lambda one: one.grade,
    }
    for name, read in columns.items():
        values = [float(value) for one in answers if (value := read(one)) is not None]
        row[name], row[f"{name}_se"] = _mean_and_error(values)
        row[f"{name}_n"] = len(values)
    row["cut"] = sum(one.is_cut for one in answers)
    return row


def _mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def compared(
    sittings: Mapping[tuple[str, str], Sitting], questions: Sequence[Question], baseline: str
) -> list[dict[str, Any]]:
    """Each model with the closed book against the baseline with the closed book, by pairs of answers.

    p-values are adjusted for the number of models (Holm).
    """
    found = []
    before = sittings[baseline, CLOSED].answers
    for group in (TRAINED, CONTROL):
        at = [number for number, one in enumerate(questions) if one.group == group]
        if not at:
            continue
        rows = [
            _pair(model, group, [before[k] for k in at], [given.answers[k] for k in at])
            for (model, book), given in sittings.items()
            if book == CLOSED and model != baseline
        ]
        for score in ("nats", "f1", "choice"):
            some = [row for row in rows if row[f"{score}_p"] is not None]
            for row, p in zip(some, holm([row[f"{score}_p"] for row in some]), strict=True):
                row[f"{score}_p"] = p
        opened = sittings.get((baseline, OPEN))
        for row in rows:
            ceiling = None if opened is None else math.fsum(opened.answers[k].nats for k in at) / len(at)
            row["gap_closed"] = _gap(before, at, ceiling, row["nats_difference"])
        found += rows
    return found


def _pair(model: str, group: str, before: Sequence[Given], after: Sequence[Given]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "group": group}
    for score in ("nats", "f1"):
        values = [[getattr(one, score) for one in some] for some in (before, after)]
        if None in values[0] + values[1]:
            row |= {f"{score}_difference": None, f"{score}_p": None, f"{score}_interval": None}
            continue
        pairs = PairedMeans.of(*values)
        row[f"{score}_difference"], row[f"{score}_p"] = pairs.difference, pairs.p()
        row[f"{score}_interval"] = list(pairs.interval())
    rights = [(a.chosen_right, b.chosen_right) for a, b in zip(before, after, strict=True)]
    known = [(bool(a), bool(b)) for a, b in rights if a is not None and b is not None]
    counted = Paired.of([a for a, _ in known], [b for _, b in known]) if known else None
    row["choice_difference"] = None if counted is None else counted.difference
    row["choice_p"] = None if counted is None else counted.p
    return row


def _gap(before: Sequence[Given], at: Sequence[int], ceiling: float | None, difference: float) -> float | None:
    """Share of the gap between closed and open book of the baseline that a training closes, in nats."""
    if ceiling is None:
        return None
    gap = math.fsum(before[k].nats for k in at) / len(at) - ceiling
    return -difference / gap if gap > 0 else None


def tables(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Both tables in Markdown."""
    lines = [
        "| model | book | questions | nats per token | F1 | numbers right | choices right | grade |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(row, "nats", 3), _cell(row, "f1", 3), _cell(row, "numbers", 2), _cell(row, "choice", 2)]
        cells.append(_cell(row, "grade", 2))
        lines.append(
            f"| {row['model']} | {row['book']} | {row['questions']} {row['group']} | " + " | ".join(cells) + " |"
        )
    if pairs:
        lines += [
            "",
            f"Closed book against {baseline}, question by question (negative nats are better):",
            "",
            "| model | questions | nats: difference [95 %], p | F1: difference [95 %], p | choices, p | gap closed |",
            "|---|---|---|---|---|---|",
        ]
    for row in pairs:
        cells = [_difference(row, "nats"), _difference(row, "f1")]
        choice = row["choice_difference"]
        cells.append("" if choice is None else f"{choice:+.2f}, {row['choice_p']:.3f}")
        cells.append("" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}")
        lines.append(f"| {row['model']} | {row['group']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], score: str, digits: int) -> str:
    value, error = row[score], row[f"{score}_se"]
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _difference(row: Mapping[str, Any], score: str) -> str:
    if row[f"{score}_difference"] is None:
        return ""
    low, high = row[f"{score}_interval"]
    return f"{row[f'{score}_difference']:+.3f} [{low:+.3f}, {high:+.3f}], {row[f'{score}_p']:.3f}"
