"""A class for every word of a text, such as the entity that it names."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from distill.core.tasks.base import Head, ModelTask


class TokenClassification(ModelTask):
    """Predict a class for every word of a text, such as named entities."""

    head: ClassVar[Head] = "token_classification"
    is_labelled: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True

    kind: Literal["token_classification"] = "token_classification"
    words: str = "words"
    """Column with the list of words; the source's `text` is not read."""
    label: str = "labels"
    """Column with the list of classes, one per word: names or whole numbers. The first token of a word predicts it."""
    classes: tuple[str, ...] | None = Field(None, min_length=2)
    """The classes, in the order of the logits; null: those of the training data, sorted. Rows have the name
    of a class, or its number from 0."""
