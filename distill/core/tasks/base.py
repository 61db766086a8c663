"""What a model is trained and measured on: the next token (the default), masked tokens, labels or sentence embeddings.

A task decides the targets and the mask of a batch (in ``data/``), the output head (in ``models/``) and the metrics (in
``evaluation/``). Losses and the training module only see ``targets`` and ``mask``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from distill.core.spec import Spec

Head = Literal["causal_lm", "masked_lm", "classification", "token_classification", "embedding"]
"""What a model predicts, by the class that transformers builds. ``embedding`` is a body without an output head."""


class ModelTask(Spec):
    """What a model is trained and measured on."""

    head: ClassVar[Head]
    """The output head that the task needs."""
    is_labelled: ClassVar[bool] = False
    """Whether every row of the data has a label."""
    has_classes: ClassVar[bool] = False
    """Whether labels are names from a fixed set."""
    compares: ClassVar[Literal["distributions", "values"]] = "distributions"
    """What the head returns: logits of a distribution, or plain numbers such as a score or an embedding."""

    kind: str

    @property
    def is_causal(self) -> bool:
        """Whether it is the prediction of the next token."""
        return self.head == "causal_lm"


class OfTexts(ModelTask):
    """A task that reads one text or a pair of texts per row."""

    text_pair: str | None = None
    """Column with the second text of a pair; null: rows have one text."""
