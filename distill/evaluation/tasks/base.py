"""The contract of a task: it asks a model questions that have a right answer, and returns one result per question.

A task does not read files of a run or of the report. Its results have a fixed order, which does not depend on the
model, so that two models can be compared question by question (:mod:`distill.numerics.statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field

from distill.core.artifact import hash_of
from distill.core.spec import Spec
from distill.data.files import File

Measure = Literal["accuracy", "normalized_accuracy"]
"""The score of a task by which models are compared."""
Prompt = str | tuple[dict[str, str], ...]
"""Text to continue, or the messages of a conversation, of which the last is the user's."""


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one question.

    Attributes:
        id: location of the question, such as ``"arc.jsonl:17"``.
        asked: hash of the question with its prompt and choices. Answers with different hashes are not comparable.
        answer: what the model chose or generated.
        wanted: the right answer.
        right: whether the answer is right.
        normalized_answer, normalized_right: ``answer`` and ``right`` if the log-likelihood of each choice is divided by
            its number of characters; None for tasks without choices.
        scores: log-likelihood of each choice, in nats, or None if it is not finite; empty if the answer is generated.
        cut: whether the beginning of the question was cut off, because it exceeded the model's context length.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    asked: str
    answer: str
    wanted: str
    right: bool
    normalized_answer: str | None = None
    normalized_right: bool | None = None
    scores: tuple[Annotated[float, Field(allow_inf_nan=False)] | None, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Answers:
    """The answers of a model to all questions of a task.

    Attributes:
        answers: one answer per question.
        chance: accuracy of random guessing, 0 to 1.
        measure: score by which models are compared.
        version: version of the questions, such as ``"lm-eval 0.4.13, version 1"``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    answers: tuple[Answer, ...]
    chance: Annotated[float, Field(ge=0, le=1)]
    measure: Measure = "accuracy"
    version: str = ""

    def rights(self, measure: Measure | None = None) -> list[bool]:
        """Whether each question is answered correctly, according to one of the scores."""
        if (measure or self.measure) == "accuracy":
            return [one.right for one in self.answers]
        return [bool(one.normalized_right) for one in self.answers]

    @property
    def is_normalized(self) -> bool:
        """Whether the task has an accuracy by length-normalised log-likelihood."""
        return all(one.normalized_right is not None for one in self.answers)


@dataclass(frozen=True)
class LogLikelihood:
    """The log-likelihood of one continuation.

    Attributes:
        nats: sum of the log-probabilities of its tokens; it may be infinite or NaN.
        is_greedy: whether each of its tokens is the most likely token at its position.
        cut: whether the beginning of the prompt was cut off.
    """

    nats: float
    is_greedy: bool
    cut: bool


class LanguageModel(Protocol):
    """A model that answers questions; see :class:`distill.evaluation.tasks.in_memory.ModelInMemory`."""

    model: Any
    tokenizer: Any
    positions: int
    batch_tokens: int

    def log_likelihoods(self, asked: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """The log-likelihood of each continuation after its prompt."""

    def written(self, prompts: Sequence[Prompt], *, new_tokens: int, stops: Sequence[str]) -> list[tuple[str, bool]]:
        """The text that the model generates for each prompt, up to the first stop string, and whether it was cut."""


class TaskSpec(Spec):
    """A task: where its questions are, how they are asked, and which answers are right."""

    kind: str
    few_shot: int | None = Field(None, ge=0, le=100)
    """Number of examples (questions with answers) before each question, the same for all questions; unset: none, or the
    number that a task of lm-eval defines."""
    limit: int | None = Field(None, ge=2)
    """Number of questions to ask, drawn by `seed`; unset: all."""
    seed: int = 0
    """Seed for drawing the questions of `limit`, the examples of `few_shot`, and the order of shuffled choices."""
    chat_template: bool = False
    """Whether to ask in the chat template (`data.chat`, else that of the run's tokenizer), with the question as the
    user's message and the answer as the assistant's."""

    def missing(self) -> str | None:
        """A missing package that the task needs, with how to install it; None if nothing is missing."""
        return None

    def files(self) -> list[File]:
        """The files that the task reads.

        Raises:
            InputError: a file does not exist.
        """
        return []

    def check(self) -> None:
        """Check that the local files exist. Files at a URL are not checked, because ``distill check`` uses no network.

        Raises:
            InputError: a file does not exist.
        """
        self.files()

    def rehearse(self, name: str) -> None:
        """Make all questions once, without a model.

        Args:
            name: name of the task in the recipe.

        Raises:
            InputError: a question cannot be made.
        """

    def ask(self, lm: LanguageModel, name: str) -> Answers:
        """Ask a model all questions.

        Args:
            lm: the model.
            name: name of the task in the recipe.

        Raises:
            InputError: the questions cannot be read, or this model cannot answer them.
        """
        raise NotImplementedError


def asked_hash(*what: Any) -> str:
    """A hash of a question as it was asked, with its choices; 16 hex digits."""
    return hash_of(*what)[:16]
