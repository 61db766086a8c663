"""One vector per text: what search, clustering and nearest-neighbour classifiers read."""

from __future__ import annotations

from typing import ClassVar, Literal

from distill.core.tasks.base import Head, ModelTask


class Embedding(ModelTask):
    """Embed a text as one vector."""

    head: ClassVar[Head] = "embedding"
    compares: ClassVar[Literal["distributions", "values"]] = "values"

    kind: Literal["embedding"] = "embedding"
    pooling: Literal["mean", "cls"] = "mean"
    """How the hidden states become one vector: their mean over the tokens, or that of the first token."""
    normalize: bool = True
    """Whether vectors are scaled to length 1."""
    label: str | None = None
    """Column with a class, for the accuracy of a nearest-neighbour classifier in `evaluate`; null: it is not measured.
    No training reads it."""
