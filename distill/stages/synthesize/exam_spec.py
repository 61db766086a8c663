"""The exam on what documents say: which questions are asked, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from distill.core.spec import Spec

TRAINED, CONTROL = "trained", "control"


class ExamSpec(Spec):
    """Questions that are made before anything is trained, and are never shown to the writer of the training rows."""

    pairs_per_seed: int = Field(1, ge=0)
    """Pairs of each context of the qna.yaml that are kept out for the exam; each context keeps one pair or more for
    the training."""
    extra_per_chunk: int = Field(0, ge=0)
    """Further questions on each chunk, made by a prompt of their own and kept where two independent answers with the
    document agree."""
    files: list[str] = Field([])
    """Further qna.yaml files on the same documents; all their pairs are asked, and none is trained on."""
    controls: list[str] = Field([])
    """qna.yaml files of knowledge that is not trained; all their pairs are asked, to show what is forgotten."""


@dataclass(frozen=True)
class Question:
    """An exam question.

    Attributes:
        question: its text.
        answer: the reference answer.
        document: the text that answers it, for the exam with the open document.
        group: "trained" or "control".
        place: where it comes from, ``file:line`` or the id of a chunk.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    question: str
    answer: str
    document: str
    group: str
    place: str
