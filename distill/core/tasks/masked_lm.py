"""Masked tokens of a text: what an encoder such as BERT predicts while it is pretrained.

Source: Devlin et al. 2018, arXiv 1810.04805 (the shares of the mask); Sanh et al. 2019, arXiv 1910.01108 (rare words,
and a teacher's distribution at all positions).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.spec import Spec
from distill.core.tasks.base import Head, ModelTask


class MaskSpec(Spec):
    """Which tokens are masked for a masked language model."""

    share: float = Field(0.15, gt=0, lt=1)
    """Fraction of the tokens of a row that is predicted, at least one; special tokens never."""
    replace: float = Field(0.8, ge=0, le=1)
    """Fraction of these that the model sees as the mask token."""
    random: float = Field(0.1, ge=0, le=1)
    """Fraction of these that the model sees as a random token; it sees the others unchanged."""
    rare_words: float = Field(0.0, ge=0)
    """Exponent a of the probability count**-a with which a token is chosen, by its count in the training data: 0.7 as
    in DistilBERT chooses rare tokens more often; 0 chooses all alike."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskSpec:
        if self.replace + self.random > 1:
            raise ValueError(f"replace ({self.replace:g}) + random ({self.random:g}) must be at most 1")
        return self


class MaskedLM(ModelTask):
    """Predict the masked tokens of a text (BERT)."""

    head: ClassVar[Head] = "masked_lm"

    kind: Literal["masked_lm"] = "masked_lm"
    mask: MaskSpec = MaskSpec()
    """Which tokens are masked; drawn anew in every pass, from the seed and the position of the row in the training."""
    positions: Literal["masked", "all"] = "masked"
    """Where losses on a teacher's distribution are computed: at the masked tokens, or at all tokens (as in DistilBERT).
    Losses on the text are always computed at the masked tokens."""
