"""A number for a text or a pair of texts, such as the similarity of two sentences."""

from __future__ import annotations

from typing import ClassVar, Literal

from distill.core.tasks.base import Head, OfTexts


class Regression(OfTexts):
    """Predict a number for a text or a pair of texts, such as a similarity."""

    head: ClassVar[Head] = "classification"
    is_labelled: ClassVar[bool] = True
    compares: ClassVar[Literal["distributions", "values"]] = "values"

    kind: Literal["regression"] = "regression"
    label: str = "label"
    """Column with the number."""
