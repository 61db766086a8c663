"""Scores of models on tasks, and what pairs of them show; as a file of an evaluate stage, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from distill.core.stored import parse_stored, read_stored
from distill.reporting.tradeoff import Role

SHOWN_AT = 0.05
"""A difference is called one where its p, adjusted for the number of tasks, is at most this."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Difference = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        model: its name in the run; role: what it is there.
        task: its name in the recipe.
        items: questions.
        accuracy, standard_error: share of right answers, and its error; None for fewer than two questions.
        normalized_accuracy, normalized_standard_error: the same by length-normalised log-likelihoods.
        is_normalized: whether the second is the one that is compared.
        chance: accuracy of a guess.
        recovery, recovery_error: what is left of the teacher's accuracy above chance, and its standard error; None for
            the teacher, and where the teacher is not above chance.
        cut: questions whose beginning did not fit the model.
        version: of the questions, in words.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    role: Role
    task: str
    items: Count
    accuracy: Share
    standard_error: Error | None
    normalized_accuracy: Share | None
    normalized_standard_error: Error | None
    is_normalized: bool
    chance: Share
    recovery: Annotated[float, Field(allow_inf_nan=False)] | None = None
    recovery_error: Error | None = None
    cut: Count = 0
    version: str = ""

    @property
    def compared(self) -> float:
        """The accuracy that pairs, verdict and ``require`` read."""
        return (
            self.normalized_accuracy if self.is_normalized and self.normalized_accuracy is not None else self.accuracy
        )


@dataclass(frozen=True)
class Pair:
    """Two models on the same questions of one task.

    Attributes:
        task: its name.
        first, second: names of the models.
        items: questions.
        difference: accuracy of the second less that of the first; low, high: its 95 % interval.
        p: exact McNemar test; p_holm: adjusted for the number of tasks of these two models.
        lost, gained: questions that only the first, or only the second, answers rightly.
        changed: share of the questions that they answer differently, rightly or not.
        smallest: the smallest difference that so many questions would have shown.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    first: str
    second: str
    items: Count
    difference: Difference
    low: Difference
    high: Difference
    p: Share
    p_holm: Share
    lost: Count
    gained: Count
    changed: Share
    smallest: Share

    @property
    def is_shown(self) -> bool:
        """Whether the questions show a difference."""
        return self.p_holm <= SHOWN_AT


@dataclass(frozen=True)
class TaskScores:
    """All that the evaluate stages of a run have found on tasks.

    Attributes:
        scores: of each model on each task, in the order of the run.
        pairs: of models on a task.
        notes: what could not be compared, and why.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    scores: tuple[Score, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(score.task for score in self.scores))

    @property
    def models(self) -> list[str]:
        """Names, the teacher first."""
        ordered = sorted(self.scores, key=lambda score: score.role != "teacher")
        return list(dict.fromkeys(score.model for score in ordered))

    def of(self, model: str, task: str) -> Score | None:
        """One score."""
        return next((score for score in self.scores if (score.model, score.task) == (model, task)), None)

    def renamed(self, names: Mapping[str, str]) -> TaskScores:
        """The same with other names of models, where there is one."""
        scores = [replace(score, model=names.get(score.model, score.model)) for score in self.scores]
        pairs = [
            replace(pair, first=names.get(pair.first, pair.first), second=names.get(pair.second, pair.second))
            for pair in self.pairs
        ]
        return TaskScores(tuple(scores), tuple(pairs), self.notes)

    def figures(self) -> dict[str, float]:
        """``model/task/what`` -> every figure that was measured."""
        found: dict[str, float | None] = {}
        for score in self.scores:
            for key in ("accuracy", "standard_error", "normalized_accuracy", "recovery"):
                found[f"{score.model}/{score.task}/{key}"] = getattr(score, key)
        return {key: value for key, value in found.items() if value is not None}


_SCORES: TypeAdapter[TaskScores] = TypeAdapter(TaskScores)


def to_json(scores: TaskScores) -> str:
    """As JSON text, which :func:`read_scores` reads."""
    text = json.dumps(asdict(scores), indent=2) + "\n"
    parse_stored(text, _SCORES, "scores of tasks", "measure again")  # what is written can be read
    return text


def read_scores(file: Path) -> TaskScores:
    """What :func:`to_json` wrote into the folder of a stage.

    Raises:
        InputError: it is anything else.
    """
    return read_stored(file, _SCORES, f"measure again by --from {file.parent.name}")


def merged(found: Sequence[TaskScores]) -> TaskScores:
    """Scores of several stages; what was measured twice counts once, the last time."""
    scores = {(score.model, score.task): score for one in found for score in one.scores}
    pairs = {(pair.first, pair.second, pair.task): pair for one in found for pair in one.pairs}
    notes = dict.fromkeys(note for one in found for note in one.notes)
    return TaskScores(tuple(scores.values()), tuple(pairs.values()), tuple(notes))
