"""The exam on what documents say: which questions are asked, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from distill.core.spec import Spec

TRAINED, CONTROL = "trained", "control"


class ExamSpec(Spec):
    """Questions that are made before anything is trained, and are never shown to the writer of the training rows."""

    pairs_per_seed: int = Field(1, ge=0)
    """Number of pairs of each context of the qna.yaml that are reserved for the exam; each context keeps at least one
    pair for the training."""
    extra_per_chunk: int = Field(0, ge=0)
    """Number of additional questions per chunk. They have their own prompt, and are kept if two independent answers
    with the document agree."""
    files: list[str] = Field([])
    """More qna.yaml files on the same documents; all their pairs are asked, and none is trained on."""
    controls: list[str] = Field([])
    """qna.yaml files with knowledge that is not trained; all their pairs are asked, to measure forgetting."""


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
