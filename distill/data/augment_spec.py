"""The `data.augment` section of a recipe: further training documents, made from those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from distill.core.spec import Spec


class ReplaceWords(Spec):
    """Add copies of each training document in which some words are replaced by others that could stand there."""

    candidates: Literal["embeddings", "masked_lm"] = "embeddings"
    """Where other words come from. embeddings: the nearest words in a model's embedding matrix; masked_lm: the words
    that an encoder predicts at that place from the surrounding text (slower)."""
    model: str = "teacher"
    """Whose embeddings, or the encoder of masked_lm: `teacher`, a folder or a Hub id. It may have another tokenizer."""
    probability: float = Field(0.4, gt=0, le=1)
    """Probability that a word is replaced, if the model has candidates for it."""
    num_candidates: int = Field(15, ge=1, le=1000)
    """Words of which one is drawn, the best ones."""
    copies: int = Field(1, ge=1, le=100)
    """Number of copies added per document."""
    seed: int = 0
    """Decides which words are replaced, and by which; another one is another text."""

    @model_validator(mode="after")
    def _an_encoder_is_named(self) -> ReplaceWords:
        if self.candidates == "masked_lm" and self.model == "teacher":
            raise ValueError(
                "candidates: masked_lm needs an encoder, which a teacher is not; name one in model (a folder or a Hub "
                "id, such as distilbert/distilbert-base-cased), or take candidates: embeddings"
            )
        return self


class AugmentSpec(Spec):
    """Add training documents that are made from others. A teacher labels them, so they need not be correct text."""

    replace_words: ReplaceWords
    """Copies in which some words are replaced."""

    def mistakes(self, *, holds_ids: bool, is_stream: bool, is_all_conversations: bool) -> Iterator[str]:
        """Why a text cannot be augmented so.

        Args:
            holds_ids: whether it is token ids.
            is_stream: whether it is never stored.
            is_all_conversations: whether there is no document in it.
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
