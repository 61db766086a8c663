"""The `data` section of a recipe: the text, how it is split, and how it becomes tokens and rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, TypeAdapter, ValidationError, model_validator

from distill.core.spec import Family, Spec
from distill.core.tasks import CausalLM, ModelTask
from distill.data import SOURCES
from distill.data.augment_spec import AugmentSpec
from distill.data.base import SourceSpec
from distill.data.chat_spec import ChatSpec
from distill.data.clean_spec import CleanSpec
from distill.data.mixture import Mixture
from distill.data.order_spec import OrderSpec

TEXTS = Family("source", *(spec for _, spec in SOURCES.items()), Mixture)
"""Sources that a run can train on, and the mixture of several."""
HELD_OUT = 0.05
MAX_DROPPED = 0.01

Packing = Literal["wrapped", "documents", "best_fit", "padded"]
"""How documents become rows; see :mod:`distill.data.rows`."""
APART: tuple[Packing, ...] = ("documents", "best_fit")
"""Packings with documents in a row that must not see each other."""
FULL: tuple[Packing, ...] = ("wrapped", "documents")
"""Packings whose rows are full, except the last one."""


class TrainTokenizer(Spec):
    """Train a new byte-level BPE tokenizer on the training text."""

    vocab_size: int = Field(2048, ge=258)
    """Maximum number of tokens, including the 256 bytes and two special tokens; small texts may give fewer."""


def _how(value: Any) -> str | None:
    """Which form of the key ``tokenizer`` is used."""
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


def holds_conversations(source: Any) -> bool:
    """Whether a source, as written in a recipe, yields conversations; False if it is not a valid source."""
    try:
        return _TEXT.validate_python(source).holds_conversations()
    except ValidationError:
        return False


_TEXT: TypeAdapter[SourceSpec] = TypeAdapter(Annotated[SourceSpec, TEXTS])


class DataSpec(Spec):
    """The text of a run."""

    train: Annotated[SourceSpec, TEXTS]
    """The source of the training text, or a mixture of several."""
    validation: Annotated[SourceSpec, SOURCES] | None = None
    """The source of the validation text; null: a part of the training text is held out. In a mixture it is set per
    source, in train.validation."""
    held_out: float = Field(HELD_OUT, gt=0, lt=1)
    """Share of the training source's documents held out for validation; only if there is no validation source."""
    sequence_length: int = Field(ge=2)
    """Maximum number of tokens in a row."""
    packing: Packing = "wrapped"
    """How documents share a row. wrapped: concatenated, each token sees all tokens before it; documents: the same rows,
    each token sees only its own document; best_fit (the default for conversations): whole documents side by side;
    padded: one document per row, padded to the longest of its batch."""
    chat: ChatSpec | None = None
    """How conversations become rows; null: with the teacher's chat template. Only with a source of conversations."""
    max_dropped: float = Field(MAX_DROPPED, ge=0, le=1)
    """Largest share of unusable rows (not JSON, a missing column, ...), which are left out; above it the run stops.
    Applies to sources with columns, of tokens and of conversations."""
    clean: CleanSpec | None = None
    """Usable training rows to leave out: those that repeat others, and those that contain rows of a test set; null:
    none."""
    augment: AugmentSpec | None = None
    """Training documents to add, derived from the existing ones; null: none. Validation rows are never changed."""
    order: OrderSpec | None = None
    """Which rows each training reads first; null: all passes are shuffled."""
    validation_tokens: int = Field(100_000, ge=1)
    """Largest number of validation tokens, approximately; they are spread over the whole validation text."""
    calibration_sequences: int = Field(128, ge=1)
    """Number of training rows for calibration and importance scores; all of them if there are fewer."""
    tokenizer: TokenizerChoice = "teacher"
    """`teacher`, a folder, a Hub id, or `{vocab_size: 2048}` to train one on the training text."""
    _task: ModelTask = PrivateAttr(default_factory=CausalLM)

    @property
    def task(self) -> ModelTask:
        """The recipe's ``task``, on which models are trained and measured."""
        return self._task

    def for_task(self, task: ModelTask) -> DataSpec:
        """The same section for a task."""
        other = self.model_copy()
        other._task = task
        return other

    def refusals(self) -> Iterator[tuple[str, str]]:
        """Yield the keys that cannot be used with the task, each with the reason."""
        if self.task.is_causal:
            return
        of = f"with task: {self.task.kind}"
        if self.packing != "padded":
            yield "packing", f"must be padded {of}, where a row is one text"
        if isinstance(self.train, Mixture):
            yield "train", f"a mixture cannot be read {of}; name one source"
        elif any(source.is_stream() for _, source in self.sources()):
            yield "train", f"a stream cannot be read {of}; set streaming: false"
        if self.holds_conversations or self.holds_ids:
            yield "train", f"conversations and token ids cannot be read {of}; name a source of text"
        for key in ("clean", "augment", "order"):
            if getattr(self, key) is not None:
                yield key, f"has no effect {of}; remove it"
        if isinstance(self.tokenizer, TrainTokenizer):
            yield "tokenizer", f"no tokenizer is trained {of}; name that of an encoder"

    def split_identity(self) -> Any:
        """What determines the validation text, for hashing: the validation source, or the share that is held out."""
        return self.validation.identity() if self.validation else self.held_out

    @property
    def holds_conversations(self) -> bool:
        """Whether some of the text is conversations."""
        return any(source is not None and source.holds_conversations() for source in (self.train, self.validation))

    def sources(self) -> Iterator[tuple[str, SourceSpec]]:
        """Yield every source with its key in the recipe; for a mixture, the sources in it."""
        if isinstance(self.train, Mixture):
            yield from ((f"data.train.sources.{name}", source) for name, source in self.train.sources.items())
            yield from ((f"data.train.validation.{name}", source) for name, source in self.train.validation.items())
        else:
            yield "data.train", self.train
        if self.validation is not None:
            yield "data.validation", self.validation

    def tests(self) -> Iterator[tuple[str, SourceSpec]]:
        """Yield the sources that no model reads, whose rows are kept out of the training text; each with its key."""
        yield from self.clean.tests() if self.clean is not None else ()

    @property
    def holds_ids(self) -> bool:
        """Whether some of the text is token ids already."""
        return any(source is not None and source.holds_ids() for source in (self.train, self.validation))

    @property
    def needs_order(self) -> bool:
        """Whether one process tokenizes the text, document by document, while the others wait.

        One process is used: for token ids, which are only copied; for the validation text of a stream, which is short;
        with ``clean.duplicates``, because each decision depends on the rows before; with ``augment``, because copies
        follow all documents.
        """
        is_cleaned = self.clean is not None and self.clean.duplicates is not None
        is_stream = any(source.is_stream() for _, source in self.sources())
        return is_cleaned or self.augment is not None or self.holds_ids or is_stream

    @property
    def drops_rows(self) -> bool:
        """Whether some of the text may have unusable rows."""
        return any(source is not None and source.drops_rows() for source in (self.train, self.validation))

    @property
    def keeps_whole(self) -> bool:
        """Whether a document that fits in a row is always kept whole."""
        return self.packing not in FULL

    @property
    def keeps_apart(self) -> bool:
        """Whether a row can hold several documents that must not see each other."""
        return self.packing in APART

    @model_validator(mode="after")
    def _conversations_stay_whole(self) -> DataSpec:
        if "packing" not in self.model_fields_set and self.train.holds_conversations():
            object.__setattr__(self, "packing", "best_fit")  # a default that depends on another field of a frozen model
            self.model_fields_set.add("packing")
        return self

    @model_validator(mode="after")
    def _chat_is_for_conversations(self) -> DataSpec:
        if self.holds_conversations and self.packing in FULL:
            raise ValueError(
                f"packing: {self.packing} cuts conversations where a row is full; use best_fit or padded, which keep "
                "them whole"
            )
        if not self.holds_conversations and self.chat is not None:
            raise ValueError("chat has no effect without conversations; use a source of kind: chat, or remove it")
        if not self.drops_rows and self.max_dropped != MAX_DROPPED:
            raise ValueError(f"max_dropped has no effect on {self.train.kind}, which has no rows; remove it")
        return self

    @model_validator(mode="after")
    def _the_text_can_be_cleaned_and_augmented(self) -> DataSpec:
        trained = self.train.sources.values() if isinstance(self.train, Mixture) else [self.train]
        text = {"holds_ids": self.holds_ids, "is_stream": any(source.is_stream() for source in trained)}
        is_all = all(source.holds_conversations() for source in trained)
        of_cleaning = () if self.clean is None else self.clean.mistakes(**text)
        of_copies = () if self.augment is None else self.augment.mistakes(**text, is_all_conversations=is_all)
        for mistake in (*of_cleaning, *of_copies):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _rows_can_be_ordered(self) -> DataSpec:
        if self.order is None:
            return self
        if self.train.is_stream():
            raise ValueError("order: a stream is read as it comes; set streaming: false, or remove order")
        if self.order.by == "length" and self.packing in FULL:
            raise ValueError(
                f"order: by length has no effect with packing: {self.packing}, whose rows are all as long; use "
                "best_fit or padded, or by: teacher_loss"
            )
        return self

    @model_validator(mode="after")
    def _ids_have_a_tokenizer(self) -> DataSpec:
        if self.holds_ids and isinstance(self.tokenizer, TrainTokenizer):
            raise ValueError("tokens are ids of a tokenizer that exists, so none is trained; name it in tokenizer")
        if self.holds_ids and self.holds_conversations:
            raise ValueError("tokens and conversations cannot stand beside each other; take one of the two for both")
        return self

    @model_validator(mode="after")
    def _one_way_to_validate(self) -> DataSpec:
        if self.validation is not None and isinstance(self.train, Mixture):
            raise ValueError(
                "validation has no effect beside a mixture, of which each source is measured for itself; name "
                "validation sources in train.validation: {NAME: {kind: ...}}, or remove it"
            )
        # A resolved recipe contains all defaults, so the default itself is no mistake.
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
