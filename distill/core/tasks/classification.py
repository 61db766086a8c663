"""The class of a text or of a pair of texts, such as a sentiment or the kind of a question."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.tasks.base import Head, OfTexts


class Classification(OfTexts):
    """Predict the class of a text or a pair of texts."""

    head: ClassVar[Head] = "classification"
    is_labelled: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True

    kind: Literal["classification"] = "classification"
    label: str = "label"
    """Column with the class: a name or a whole number."""
    classes: tuple[str, ...] | None = Field(None, min_length=2)
    """The classes, in the order of the logits; null: those of the training data, sorted. Rows have the name
    of a class, or its number from 0."""

    @model_validator(mode="after")
    def _each_once(self) -> Classification:
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a class is there more than once")
        return self
