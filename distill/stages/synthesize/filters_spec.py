"""Settings of the filters; see :mod:`distill.stages.synthesize.filters`."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill.core.spec import Spec


class FiltersSpec(Spec):
    """Which rows are dropped; the order is fixed, see docs/stages/synthesize.md."""

    question_words: tuple[int, int] = (3, 60)
    """Fewest and most words of a question."""
    answer_words: tuple[int, int] = (1, 400)
    """Fewest and most words of an answer, or of a text."""
    refers_to_text: bool = True
    """Drop rows with a document whose question or answer mentions "the passage" or "Figure 2"."""
    duplicates: bool = True
    """Drop rows whose question (or text) equals that of an earlier row."""
    grounded: bool = True
    """Drop answers with numbers or names that are neither in the document nor in the question."""
    min_likelihood_gain: float | None = None
    """Smallest gain in the writer's mean log-probability per token of the answer: with the document minus without it;
    unset is off. Not available from a server."""
    judge: bool = False
    """Ask the writer about each remaining row with a document: is the answer faithful to the document, is the question
    clear without it, and does the answer fit the question?"""
    max_per_chunk: int | None = Field(None, ge=1)
    """Largest number of rows per chunk, or per source; unset: no limit."""
    min_yield: float = Field(0.1, ge=0, le=1)
    """Smallest fraction of the rows that must remain; below it the stage stops and shows the replies. 0 is off."""

    @model_validator(mode="after")
    def _limits_rise(self) -> FiltersSpec:
        for key in ("question_words", "answer_words"):
            fewest, most = getattr(self, key)
            if not 0 <= fewest <= most:
                raise ValueError(f"{key}: needs [fewest, most], rising (got [{fewest}, {most}])")
        return self
