"""From the answers of several models to the same questions to scores and pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from distill.evaluation.tasks.base import Answers
from distill.numerics.statistics import CONFIDENCE, Paired, holm, standard_error
from distill.reporting.task_scores import Pair, Score, TaskScores
from distill.reporting.tradeoff import Row
from distill.reporting.verdict import main_student

Given = Mapping[tuple[str, str], Answers]
"""(task, model) -> its answers."""


def compared(rows: Sequence[Row], given: Given) -> TaskScores:
    """Scores of each model, and pairs: the teacher with each other model, each control with its student.

    Args:
        rows: the models, in the order of the run.
        given: what they answered.
    """
    tasks = list(dict.fromkeys(task for task, _ in given))
    teacher = next((row.name for row in rows if row.role == "teacher"), None)
    notes: list[str] = []
    scores = []
    for row in rows:
        for task in tasks:
            own, theirs = given.get((task, row.name)), given.get((task, teacher or ""))
            if own is None:  # its engine is missing, or cannot be asked this
                continue
            score = _score(row, task, own)
            if theirs is not None and row.name != teacher and _same(theirs, own):
                kept = Paired.of(theirs.rights(), own.rights()).recovery(own.chance)
                score = score if kept is None else replace(score, recovery=kept[0], recovery_error=kept[1])
            if score.cut:
                notes.append(f"{task}: the beginning of {score.cut} of {score.items} questions does not fit {row.name}")
            scores.append(score)
    pairs: list[Pair] = []
    for first, second in _couples(rows, teacher):
        both = [task for task in tasks if (task, first) in given and (task, second) in given]
        if apart := [task for task in both if not _same(given[task, first], given[task, second])]:
            notes.append(
                f"{first} and {second} were not asked the same in {', '.join(apart)}, so they are not compared"
            )
        pairs += _pairs(first, second, {task: given for task in both if task not in apart})
    return TaskScores(tuple(scores), tuple(pairs), tuple(dict.fromkeys(notes)))


def _score(row: Row, task: str, own: Answers) -> Score:
    right, items = sum(own.rights("accuracy")), len(own.answers)
    normal = sum(own.rights("normalized_accuracy")) if own.is_normalized else None
    return Score(
        model=row.name,
        role=row.role,
        task=task,
        items=items,
        accuracy=right / items,
        standard_error=standard_error(right, items),
        normalized_accuracy=None if normal is None else normal / items,
        normalized_standard_error=None if normal is None else standard_error(normal, items),
        is_normalized=own.measure == "normalized_accuracy",
        chance=own.chance,
        cut=sum(one.cut for one in own.answers),
        version=own.version,
    )


def _couples(rows: Sequence[Row], teacher: str | None) -> Iterator[tuple[str, str]]:
    """(first, second) of each pair: what the second lost or gained is told."""
    if teacher is not None:
        yield from ((teacher, row.name) for row in rows if row.name != teacher)
    yield from ((row.baseline, row.name) for row in rows if row.baseline is not None)
    models = [row for row in rows if not row.is_file]
    for control in (row for row in models if row.role == "control"):
        alike = [row for row in models if row.role == "student" and row.scheme == control.scheme]
        peers = [row for row in alike if row.parent == control.parent and row.kind == "distill"]
        student = peers[-1] if peers else main_student(alike)
        if student is not None:
            yield control.name, student.name


def _pairs(first: str, second: str, given: Mapping[str, Given]) -> list[Pair]:
    made = []
    for task, answers in given.items():
        one, other = answers[task, first], answers[task, second]
        paired = Paired.of(one.rights(), other.rights())
        low, high = paired.interval()
        normal = one.measure == "normalized_accuracy"
        differ = [a.normalized_answer != b.normalized_answer if normal else a.answer != b.answer
                  for a, b in zip(one.answers, other.answers, strict=True)]  # fmt: skip
        smallest = paired.smallest((1 - CONFIDENCE) / len(given))
        made.append(
            Pair(task, first, second, paired.items, paired.difference, low, high, paired.p, paired.p, paired.lost,
                 paired.gained, sum(differ) / len(differ), smallest)
        )  # fmt: skip
    adjusted = holm([pair.p for pair in made])
    return [replace(pair, p_holm=p) for pair, p in zip(made, adjusted, strict=True)]


def _same(one: Answers, other: Answers) -> bool:
    """Whether two models were asked the same questions in the same words."""
    return [a.asked for a in one.answers] == [b.asked for b in other.answers] and one.measure == other.measure
