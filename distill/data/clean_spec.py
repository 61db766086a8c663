"""The `data.clean` section of a recipe: which usable training rows are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distill.core.spec import Spec
from distill.data import SOURCES
from distill.data.base import SourceSpec

VALIDATION = "validation"


def _which(value: Any) -> str:
    return "validation" if value == VALIDATION else "source"


TestText = Annotated[
    Annotated[Literal["validation"], Tag("validation")] | Annotated[Annotated[SourceSpec, SOURCES], Tag("source")],
    Discriminator(_which),
]


class CleanSpec(Spec):
    """Leave out training rows that repeat other rows, or that contain rows of a test set. All validation rows are
    kept."""

    duplicates: Literal["exact", "near"] | None = None
    """Which duplicates are left out; the first of several equal rows is kept. exact: rows that are equal after case,
    whitespace and Unicode form are normalised; near: also documents of at least 50 words that share about three
    quarters of their word 5-grams (MinHash), and conversations with near-duplicate answers and otherwise identical
    messages. Questions are never compared approximately."""
    decontaminate: list[TestText] = Field([])
    """Test sets, as sources, and `validation` for this run's validation text. A training row is removed if word 8-grams
    that it shares with a test row cover more than half of that test row's words."""

    @model_validator(mode="after")
    def _leaves_something_out(self) -> CleanSpec:
        if self.duplicates is None and not self.decontaminate:
            raise ValueError("has no effect so; set duplicates: exact, or decontaminate: [...], or remove it")
        return self

    def tests(self) -> Iterator[tuple[str, SourceSpec]]:
        """Yield the sources of test sets, each with its key in the recipe."""
        for number, one in enumerate(self.decontaminate):
            if isinstance(one, SourceSpec):
                yield f"data.clean.decontaminate.{number}", one

    @property
    def of_validation(self) -> bool:
        """Whether the run's validation text is one of the test sets."""
        return VALIDATION in self.decontaminate

    def mistakes(self, *, holds_ids: bool, is_stream: bool) -> Iterator[str]:
        """Yield the reasons why this text cannot be cleaned.

        Args:
            holds_ids: whether the text consists of token ids.
            is_stream: whether the text is a stream, which is never stored.
        """
        if is_stream:
            yield "clean: a stream is not stored, so what was read of it before is not known; set streaming: false"
        elif holds_ids and (self.duplicates == "near" or self.decontaminate):
            yield "clean: near and decontaminate compare words, and token ids have none; use duplicates: exact alone"
        for key, source in self.tests():
            where = key.removeprefix("data.")
            if source.is_stream():
                yield f"{where}: a test set is read as a whole, and a stream has no end; set streaming: false"
            elif source.holds_ids():
                yield f"{where}: token ids have no words to compare; give the text"
