"""The `data.clean` section of a recipe: which training rows are left out although they could be used."""

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
    """Leave out training rows that repeat other rows, or that hold rows of a test set. Validation rows all stay."""

    duplicates: Literal["exact", "near"] | None = None
    """Of rows that say the same, the first one stays. exact: equal but for case, whitespace and Unicode form; near:
    also documents of at least 50 words that share about three quarters of their runs of five words (MinHash), and
    conversations whose answers do so and which are equal in all else: never by their questions, which are alike."""
    decontaminate: list[TestText] = Field([])
    """Test sets, as sources, and `validation` for what this run validates on. A training row is left out that holds
    more than half of the words of one of their rows in common runs of eight words."""

    @model_validator(mode="after")
    def _leaves_something_out(self) -> CleanSpec:
        if self.duplicates is None and not self.decontaminate:
            raise ValueError("has no effect so; set duplicates: exact, or decontaminate: [...], or remove it")
        return self

    def tests(self) -> Iterator[tuple[str, SourceSpec]]:
        """The sources of test sets, each with its key in the recipe."""
        for number, one in enumerate(self.decontaminate):
            if isinstance(one, SourceSpec):
                yield f"data.clean.decontaminate.{number}", one

    @property
    def of_validation(self) -> bool:
        """Whether what the run validates on is one of the test sets."""
        return VALIDATION in self.decontaminate

    def mistakes(self, *, holds_ids: bool, is_stream: bool) -> Iterator[str]:
        """Why a text cannot be cleaned so.

        Args:
            holds_ids: whether it is token ids.
            is_stream: whether it is never stored.
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
