"""Scores on tasks in words: a difference is named where the questions show one, and only there."""

from __future__ import annotations

from collections.abc import Sequence

from distill.reporting.task_scores import Pair, TaskScores
from distill.reporting.task_tables import p_text, points
from distill.reporting.tradeoff import Row
from distill.reporting.verdict import main_student


def task_verdict(scores: TaskScores, rows: Sequence[Row]) -> list[str]:
    """A sentence for the main student and each rounded one beside the teacher, and for each control.

    Args:
        scores: of the run.
        rows: its models.
    """
    teacher = next((row.name for row in rows if row.role == "teacher"), None)
    student = main_student(rows)
    rounded = [row for row in rows if row.role == "student" and row.scheme is not None and row is not student]
    said = [row.name for row in ([student] if student is not None else []) + rounded[-1:]]
    sentences = []
    for name in said:
        pairs = [pair for pair in scores.pairs if (pair.first, pair.second) == (teacher, name)]
        if pairs:
            parts = [f"{pair.task} {_beside_teacher(pair, scores)}" for pair in pairs]
            sentences.append(f"{name} on tasks: {'; '.join(parts)}.")
    controls = {row.name for row in rows if row.role == "control"}
    for first, second in dict.fromkeys((pair.first, pair.second) for pair in scores.pairs if pair.first in controls):
        pairs = [pair for pair in scores.pairs if (pair.first, pair.second) == (first, second)]
        parts = [f"{pair.task} {_change(pair)}" for pair in pairs]
        sentences.append(f"{second} beside {first}: {'; '.join(parts)}.")
    return sentences


def _beside_teacher(pair: Pair, scores: TaskScores) -> str:
    own, whole = scores.of(pair.second, pair.task), scores.of(pair.first, pair.task)
    if own is None or whole is None:
        return _change(pair)
    kept = ""
    if own.recovery is None:
        kept = ", and the teacher is not above chance" if own.chance else ""
    elif own.recovery_error is not None:
        kept = f", {points(own.recovery)} \N{PLUS-MINUS SIGN} {points(own.recovery_error)} % kept above chance"
    return f"{points(own.compared)} % against {points(whole.compared)} %, {_change(pair)}{kept}"


def _change(pair: Pair) -> str:
    if not pair.is_shown:
        return f"no difference shown ({points(pair.smallest)} points or more would be)"
    word = "better" if pair.difference > 0 else "worse"
    return f"{points(abs(pair.difference))} points {word} (p {p_text(pair.p_holm)})"
