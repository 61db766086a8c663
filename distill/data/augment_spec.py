"""The `data.augment` section of a recipe: further training documents, derived from the existing ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from distill.core.spec import Spec


class ReplaceWords(Spec):
    """Add copies of each training document in which some words are replaced by other words that fit in their
    context."""

    candidates: Literal["embeddings", "masked_lm"] = "embeddings"
    """Source of the replacement words. embeddings: the nearest words in a model's embedding matrix; masked_lm: the
    words that an encoder predicts at that place from the surrounding text (slower)."""
    model: str = "teacher"
    """The model whose embeddings are used, or the encoder of masked_lm: `teacher`, a folder or a Hub id. It may have
    another tokenizer."""
    probability: float = Field(0.4, gt=0, le=1)
    """Probability that a word is replaced, if the model has candidates for it."""
    num_candidates: int = Field(15, ge=1, le=1000)
    """Number of best candidates from which the replacement is drawn."""
    copies: int = Field(1, ge=1, le=100)
    """Number of copies added per document."""
    seed: int = 0
    """Decides which words are replaced, and by which. Changing it changes the text."""

    @model_validator(mode="after")
    def _an_encoder_is_named(self) -> ReplaceWords:
        if self.candidates == "masked_lm" and self.model == "teacher":
            raise ValueError(
                "candidates: masked_lm needs an encoder, which a teacher is not; name one in model (a folder or a Hub "
                "id, such as distilbert/distilbert-base-cased), or take candidates: embeddings"
            )
        return self


class AugmentSpec(Spec):
    """Add training documents that are derived from others. A teacher labels them, so they need not be correct text."""

    replace_words: ReplaceWords
    """Copies in which some words are replaced."""

    def mistakes(self, *, holds_ids: bool, is_stream: bool, is_all_conversations: bool) -> Iterator[str]:
        """Yield the reasons why this text cannot be augmented.

        Args:
            holds_ids: whether the text consists of token ids.
            is_stream: whether the text is a stream, which is never stored.
            is_all_conversations: whether the text consists of conversations only.
        """
        if is_stream:
            yield "augment: a stream has no end behind which copies could stand; set streaming: false"
        elif holds_ids:
            yield "augment: token ids have no words to replace; give the text"
        elif is_all_conversations:
            yield (
                "augment: only documents are copied, and all is conversations: with other words in a question its "
                "answer answers another one; let the teacher answer new questions in a synthesize stage, or remove it"
            )
