"""The `data` section of a recipe: which text, how it is split, in which tokens and blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distill.core.spec import Spec
from distill.data import SOURCES
from distill.data.base import SourceSpec

HELD_OUT = 0.05

Packing = Literal["wrapped", "documents", "best_fit", "padded"]
"""How documents become rows; see :mod:`distill.data.rows`."""
APART: tuple[Packing, ...] = ("documents", "best_fit")
"""Those with documents in a row that must not see each other."""
FULL: tuple[Packing, ...] = ("wrapped", "documents")
"""Those whose rows are full, but for the last one."""


class TrainTokenizer(Spec):
    """Train a new byte-level BPE tokenizer on the training text."""

    vocab_size: int = Field(2048, ge=258)
    """Tokens at most, with the 256 bytes and two special tokens among them; small texts may give fewer."""


def _how(value: Any) -> str | None:
    """Which form of the tokenizer key was written."""
    if isinstance(value, str):
        return "name"
    return "train" if isinstance(value, dict | TrainTokenizer) else None


TokenizerChoice = Annotated[
    Annotated[str, Tag("name")] | Annotated[TrainTokenizer, Tag("train")],
    Discriminator(
        _how,
        custom_error_type="tokenizer_choice",
        custom_error_message="needs a name, a folder, a Hub id or {vocab_size: ...}",
    ),
]


class DataSpec(Spec):
    """The text of a run."""

    train: Annotated[SourceSpec, SOURCES]
    """The source of the training text."""
    validation: Annotated[SourceSpec, SOURCES] | None = None
    """The source of the validation text; null holds a part of the training text out."""
    held_out: float = Field(HELD_OUT, gt=0, lt=1)
    """Share of the training source's documents held out for validation; only when there is no validation source."""
    sequence_length: int = Field(ge=2)
    """Tokens in a block, at most."""
    packing: Packing = "wrapped"
    """How documents share a block. wrapped: end to end, each token sees all before it; documents: the same blocks, each
    token sees its own document alone; best_fit: whole documents side by side; padded: one a block, filled up."""
    validation_tokens: int = Field(100_000, ge=1)
    """Validate on about so many tokens at most, spread over the whole validation text."""
    calibration_sequences: int = Field(128, ge=1)
    """Training blocks that calibration and importance scores see; all of them when there are fewer."""
    tokenizer: TokenizerChoice = "teacher"
    """`teacher`, a folder, a Hub id, or `{vocab_size: 2048}` to train one on the training text."""

    @property
    def keeps_apart(self) -> bool:
        """Whether a row can hold several documents that must not see each other."""
        return self.packing in APART

    @model_validator(mode="after")
    def _one_way_to_validate(self) -> DataSpec:
        # A resolved recipe writes defaults out, so the default itself is no mistake.
        if self.validation is not None and self.held_out != HELD_OUT:
            raise ValueError("held_out has no effect beside a validation source; remove one of the two")
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_list_of_documents(self) -> DataSpec:
        if self.packing not in FULL and any(s and s.is_stream() for s in (self.train, self.validation)):
            raise ValueError(
                f"packing: {self.packing} must know the length of every document, and a stream tells it too late; "
                "use documents, which also keeps them apart, or store the text first"
            )
        return self
