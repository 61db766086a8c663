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
    """Drop rows with a document that speak of "the passage" or "Figure 2"."""
    duplicates: bool = True
    """Drop rows whose question (or text) an earlier row has."""
    grounded: bool = True
    """Drop answers with numbers or names that are neither in the document nor in the question."""
    min_likelihood_gain: float | None = None
    """Smallest mean log-probability per token of the answer with the document minus without it, by the writer; unset is
    off. A server does not tell it."""
    judge: bool = False
    """Ask the writer about each remaining row with a document whether the answer is faithful to it, the question clear
    without it, and the answer one to the question."""
    max_per_chunk: int | None = Field(None, ge=1)
    """Rows of one chunk, or of one source, at most; unset: any number."""
    min_yield: float = Field(0.1, ge=0, le=1)
    """Share of the rows that must remain; below it the stage stops and shows what was written; 0 is off."""

    @model_validator(mode="after")
    def _limits_rise(self) -> FiltersSpec:
        for key in ("question_words", "answer_words"):
            fewest, most = getattr(self, key)
            if not 0 <= fewest <= most:
                raise ValueError(f"{key}: needs [fewest, most], rising (got [{fewest}, {most}])")
        return self
