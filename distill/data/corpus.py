"""The text of a run: token files, the rows cut from them, and data loaders."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.seal import is_sealed, seal
from distill.core.world import SINGLE_PROCESS, World
from distill.data import loader
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.clean import Cleaner
from distill.data.curriculum import longest_documents
from distill.data.describe import described, lines_of_sources
from distill.data.encoder import TextEncoder
from distill.data.first_tokens import described as described_start
from distill.data.joined import join_tokens
from distill.data.micro_batches import MicroBatches
from distill.data.mixture import Mixture
from distill.data.mixture_order import as_whole, passes, tokens_per_row
from distill.data.mixture_split import OneText, texts_of
from distill.data.order_spec import OrderSpec
from distill.data.packed_rows import PackedRows
from distill.data.packing import Part, TokenFile, file_lock
from distill.data.repeats import ValidationRepeats, can_repeat
from distill.data.replace_words import Candidates, WordReplacer
from distill.data.spec import FULL, DataSpec, TrainTokenizer
from distill.data.split import RULE, Split
from distill.data.stream import Stream
from distill.data.stream_shards import RULE as RULE_OF_STREAMS
from distill.data.token_encoder import TokenEncoder
from distill.data.token_writer import token_too_large
from distill.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from distill.data.tokenizing import Tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.data.loader import Batches


class Budget(Protocol):
    """How long a stage trains; see :class:`distill.training.spec.BudgetSpec`."""

    def for_rows(self, num_rows: int | None) -> Budget:
        """The budget in steps, if it was in epochs; otherwise unchanged."""

    def steps(self, tokens_per_sequence: float) -> int:
        """Number of optimizer steps."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as rows of token ids. Make it with :meth:`open`.

    Attributes:
        train: training rows: a finite set, or a stream.
        validation: validation rows, spread evenly over the validation text, with about ``data.validation_tokens``
            tokens at most.
        seed: decides the order of training.
        calibration_sequences: rows for calibration.
        hash: hash of the text, the split, the tokenizer and the rows. Runs with the same hash and seed have the same
            row order, unless ``order`` differs.
        stops: ids that end a turn of the assistant; empty if the text has no conversations.
        start: the tokens that the tokenizer puts before a text; each row begins with them.
        order: which rows a training reads first; None: the seed alone decides the order.
    """

    train: PackedRows | Stream
    validation: PackedRows
    seed: int
    calibration_sequences: int
    hash: str
    stops: tuple[int, ...] = ()
    start: tuple[str, ...] = ()
    order: OrderSpec | None = None

    @classmethod
    def open(
        cls,
        data: DataSpec,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | Path,
        seed: int,
        vocabulary_size: int,
        candidates: Candidates | None = None,
        world: World = SINGLE_PROCESS,
    ) -> Corpus:
        """Tokenize what is not tokenized yet, and open it.

        Processes that open the same folder at the same time tokenize a part each. If the parts depend on each other,
        one process tokenizes all and the others wait; see :mod:`distill.data.tokenizing`.

        Args:
            data: the recipe's ``data`` section.
            tokenizer: converts text to ids; its chat template renders conversations.
            folder: where token files are stored, such as ``<run>/data``.
            seed: decides the order of training.
            vocabulary_size: number of rows of the smallest head among the models that use the ids.
            candidates: source of replacement words; required only with ``data.augment``.
            world: the processes that open it at the same time.

        Raises:
            InputError: no or too little text, ids outside the models' vocabulary, an unusable chat template, or more
                unusable rows than the recipe allows.
            MachineError: the folder cannot be written.
        """
        folder, encoder = Path(folder), _encoder(data, tokenizer)
        sharing = None if data.needs_order else world
        with file_lock(folder) if sharing is None else nullcontext():
            key, tokens = _opened(folder, data, encoder, tokenizer, vocabulary_size, candidates, sharing)
        everything = PackedRows(tokens["validation"], data.sequence_length, packing=data.packing)
        validation = everything.only(_spread(everything, data))
        train: PackedRows | Stream
        if data.train.is_stream():
            ahead = hash_of(key, data.sequence_length, vocabulary_size, RULE_OF_STREAMS)
            place, apart = folder / f"stream-{ahead}", data.packing == "documents"
            train = Stream(Split(data), encoder, data.sequence_length, vocabulary_size, place, apart, data.max_dropped)
            train.first(1)  # an empty stream is found now, not in the middle of a run
        else:
            train = PackedRows(tokens["train"], data.sequence_length, packing=data.packing)
        weights = [part.weight for part in tokens["train"].parts] if "train" in tokens else []
        identity = hash_of(key, data.sequence_length, data.packing, data.validation_tokens, *weights)
        stops = encoder.stops if isinstance(encoder, ChatEncoder) else ()
        begins = tuple(encoder.start_tokens)
        corpus = cls(train, validation, seed, data.calibration_sequences, identity, stops, begins, data.order)
        corpus._check_validation("data.validation", tokens["validation"])
        given = data.train.validation if isinstance(data.train, Mixture) else {}
        for part, one in zip(tokens["validation"].parts, corpus.by_source().values(), strict=True):
            held_out = f"data.train.sources.{part.name}, what is held out of it"
            one._check_validation(f"data.train.validation.{part.name}" if part.name in given else held_out, part.tokens)
        return corpus

    def by_source(self) -> dict[str, Corpus]:
        """For a mixture: source name -> corpus with only that source's validation rows. Otherwise empty."""
        source, parts = self.validation.source_of_rows(), self.validation.tokens.parts
        return {
            part.name: replace(self, validation=self.validation.only(np.flatnonzero(source == number)))
            for number, part in enumerate(parts)
        }

    def _check_validation(self, key: str, tokens: TokenFile) -> None:
        """Check that something can be measured on the validation text.

        Raises:
            InputError: no token of it is predicted from a preceding one.
        """
        if self.validation_bytes == 0:
            raise InputError(
                f"{key}: nothing to measure on: no token of text is predicted from another in "
                f"{tokens.num_tokens} tokens of {tokens.num_documents} documents; give more text"
            )

    def train_loader(
        self, taken: MicroBatches, num_workers: int = 0, num_sequences: int = 0, losses: np.ndarray | None = None
    ) -> Batches:
        """Loader of micro-batches for training, endless.

        Args:
            taken: the positions that this process takes.
            num_workers: number of processes that read ahead; a stream uses one of its own. The order does not depend on
                it.
            num_sequences: number of rows of the whole training, of which ``order`` sorts a fraction.
            losses: loss of the teacher on each row, if ``order`` sorts by it. [rows]
        """
        if isinstance(self.train, Stream):
            return loader.stream_batches(self.train, taken)
        count = self.num_sorted(num_sequences)
        hardness = losses if self.order is not None and self.order.by == "teacher_loss" else None
        if count and hardness is None:
            if self.order is not None and self.order.by == "teacher_loss":
                raise ValueError("data.order by teacher_loss needs the losses")
            hardness = longest_documents(self.train)
        return loader.train_batches(self.train, self.seed, taken, num_workers, count, hardness)

    def num_sorted(self, num_sequences: int) -> int:
        """Number of initial rows, of ``num_sequences`` training rows, that are sorted by difficulty."""
        return 0 if self.order is None else round(self.order.until * num_sequences)

    def validation_loader(self, batch_size: int, num_sequences: int | None = None) -> Batches:
        """Loader of every validation row, or of ``num_sequences`` rows evenly spread over the text; once, in a fixed
        order."""
        return loader.validation_batches(self.validation, batch_size, num_sequences)

    def calibration_loader(self, num_sequences: int | None = None, batch_size: int = 8) -> Batches:
        """Loader of training rows for calibration, always the same; ``num_sequences`` None: as many as the recipe says.

        The seed chooses the rows; for a stream they are the first ones. If there are fewer rows, all are used. Copies
        that ``data.augment`` added are not among them.
        """
        rows = self.train if isinstance(self.train, Stream) else self.train.originals()
        return loader.calibration_batches(rows, self.seed, num_sequences or self.calibration_sequences, batch_size)

    @cached_property
    def tokens_per_sequence(self) -> float:
        """Average number of tokens of text in a training row."""
        if isinstance(self.train, PackedRows) and self.train.tokens.parts:
            return tokens_per_row(loader.rows_of_sources(self.train))
        if isinstance(self.train, Stream) or self.train.packing in FULL:
            return self.train.sequence_length  # except in the last row
        return float(self.train.lengths().mean())

    @property
    def num_rows(self) -> int | None:
        """Number of training rows; None for a stream."""
        return None if isinstance(self.train, Stream) else len(self.train)

    def steps_of(self, budget: Budget) -> int:
        """Number of optimizer steps of a budget on these rows.

        Raises:
            InputError: the budget is in epochs, and the rows cannot be counted.
        """
        return budget.for_rows(self.num_rows).steps(self.tokens_per_sequence)

    def passes(self, num_sequences: float) -> dict[str, float]:
        """For a mixture: source name -> number of passes over it in ``num_sequences`` training rows. Otherwise
        empty."""
        if not isinstance(self.train, PackedRows) or not self.train.tokens.parts:
            return {}
        times = passes(loader.rows_of_sources(self.train), num_sequences)
        return {part.name: often for part, often in zip(self.train.tokens.parts, times, strict=True)}

    @cached_property
    def validation_bytes(self) -> int:
        """Exact number of UTF-8 bytes of text that the counted predictions of :meth:`validation_loader` cover.

        Bits per byte = summed loss in nats / ln 2 / this number. The end of a document is predicted, but counts 0
        bytes.
        """
        return int(self.validation.bytes_of_rows().sum())

    def summary(self) -> str:
        """Summary for the user: one line, and further lines if rows were left out or something else was found."""
        validation = self.validation
        line = (
            f"{described(self.train)}; validation {len(validation):,} rows, {validation.num_predictions():,} "
            f"predictions, {self.validation_bytes:,} bytes"
        )
        of_sources = {name: one.validation for name, one in self.by_source().items()}
        return "\n".join([line, *lines_of_sources(self.train, of_sources), *self.notes()])

    def notes(self) -> list[str]:
        """Notes for the user, one line each: what rows begin with, which rows were left out and why, and what else was
        found."""
        files = {"data.validation": self.validation.tokens}
        if isinstance(self.train, PackedRows):
            files = {"data.train": self.train.tokens, **files}
        lines = []
        for key, file in files.items():
            parts = {f"{key}, {part.name}": part.tokens for part in file.parts} or {key: file}
            lines += [line for where, one in parts.items() for line in one.tally.lines(where)]
        return [described_start(self.start), *lines] if self.start else lines


def trained_tokenizer(data: DataSpec, spec: TrainTokenizer, folder: str | Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the text of the run and save it in ``folder``, or load it if it is already there.

    Args:
        data: the recipe's ``data`` section.
        spec: size of its vocabulary.
        folder: where it is saved, such as ``<run>/data``.

    Raises:
        InputError: there is no text to train it on.
        MachineError: the folder cannot be written.
    """
    held_out = data.held_out if data.validation is None else data.validation.identity()
    key = hash_of(data.train.identity(), held_out, spec.vocab_size, RULE)
    place = Path(folder) / f"tokenizer-{key}"
    with file_lock(Path(folder)):
        if not is_sealed(place):
            if place.exists():
                print(f"{place.name}: not what was written; the tokenizer is trained again", file=sys.stderr)
            train_tokenizer(chain.from_iterable(one.split.texts() for one in texts_of(data)), spec.vocab_size, place)
            seal(place)
    return load_tokenizer(place)


def _encoder(data: DataSpec, tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    """The encoder for the documents and conversations of the text."""
    if data.holds_ids:
        return TokenEncoder(tokenizer)
    if not data.holds_conversations:
        return TextEncoder(tokenizer)
    return ChatEncoder(tokenizer, data.chat or ChatSpec(), data.sequence_length)


def _key(data: DataSpec, encoder: TextEncoder, tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that determines the token ids."""
    validation = data.validation or data.train
    return hash_of(
        data.train.identity(),
        data.split_identity(),
        data.validation_tokens if validation.is_stream() else None,
        tokenizer_hash(tokenizer),
        *encoder.identity(),
        RULE,
    )


def _opened(
    folder: Path,
    data: DataSpec,
    encoder: TextEncoder,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary_size: int,
    candidates: Candidates | None,
    world: World | None,
) -> tuple[str, dict[str, TokenFile]]:
    """Return (hash of the tokens of a text, side -> token file). For a mixture, each file joins those of all
    sources."""
    texts, sides = texts_of(data), ("validation",) if data.train.is_stream() else ("train", "validation")
    cleaner = None if data.clean is None else Cleaner(data.clean, texts)
    replacer = _replacer(data, candidates, folder)
    is_cleaned = data.clean is not None and data.clean.of_validation
    repeats = ValidationRepeats(texts) if can_repeat(texts, is_cleaned=is_cleaned) else None
    more = [*(cleaner.identity() if cleaner else ()), *(replacer.identity() if replacer else ())]
    keys: dict[str, dict[str, str]] = {}
    for text in texts:
        key = _key(text.data, encoder, tokenizer)
        key = key if text.others is None else hash_of(key, text.others)
        # validation rows stay as they are
        keys[text.name] = {"validation": key, "train": hash_of(key, *more) if more else key}
    tokenizing = Tokenizing(encoder, vocabulary_size, cleaner, replacer, repeats, world)
    found: dict[str, dict[str, TokenFile]] = {text.name: {} for text in texts}
    for side in reversed(sides):  # validation first: no source may train on another's validation text
        for text in texts:
            file = folder / f"{text.key(side)}-{keys[text.name][side]}.bin"
            found[text.name][side] = tokenizing.tokens_of(file, side, text)
    made: dict[str, tuple[str, dict[str, TokenFile]]] = {}
    for text in texts:
        tokens = {side: found[text.name][side] for side in sides}
        _check(tokens, text, vocabulary_size)
        _check_split(tokens, text)
        made[text.name] = (keys[text.name]["train"], tokens)
    if not isinstance(data.train, Mixture):
        return made[""]
    key = hash_of({name: one for name, (one, _) in made.items()})
    shares = data.train.shares({name: tokens["train"].num_tokens for name, (_, tokens) in made.items()})
    weights = dict(zip(shares, as_whole(list(shares.values())), strict=True))
    joined = {}
    for side in sides:
        parts = [Part(name, weights[name], tokens[side]) for name, (_, tokens) in made.items()]
        with nullcontext() if world is None else file_lock(folder):
            joined[side] = join_tokens(folder / f"{side}-{key}.bin", parts)
    return key, joined


def _replacer(data: DataSpec, candidates: Candidates | None, folder: Path) -> WordReplacer | None:
    """The object that adds augmented copies of documents; None without ``data.augment``."""
    if data.augment is None:
        return None
    if candidates is None:
        raise ValueError("data.augment.replace_words needs candidates")
    return WordReplacer(data.augment.replace_words, candidates, folder)


def _check(tokens: dict[str, TokenFile], text: OneText, vocabulary_size: int) -> None:
    """Check for ids outside the model's vocabulary, too many unusable rows, and too little text."""
    data = text.data
    for side, file in tokens.items():
        name = text.key(side)
        file.tally.check(f"data.{name}", data.max_dropped)
        # Check again: an existing file may have been written for a larger vocabulary.
        if file.largest >= vocabulary_size:
            raise InputError(token_too_large(f"data.{name}", file.largest, vocabulary_size))
        if side == "train" and data.augment is not None and not data.holds_conversations and not file.tally.copies:
            raise InputError(
                f"data.{name}: data.augment could replace no word of it: no word is a single token of its model; name "
                "another model, set candidates: embeddings, or remove data.augment"
            )
        cut = side == "train" and data.packing in FULL
        needed = data.sequence_length if cut else 2
        if file.num_tokens < needed:
            raise InputError(
                f"data.{name}: empty corpus: {file.num_tokens} tokens in {file.num_documents} documents, expected at "
                f"least {needed}; give more text"
                + (f" or shorter rows (sequence_length {needed})" * cut)
                + (f"; data.clean left out {file.tally.num_removed:,} rows" if file.tally.num_removed else "")
            )


def _check_split(tokens: dict[str, TokenFile], text: OneText) -> None:
    """Check that the held-out part of conversations is not far too large.

    Conversations with the same text before the first answer stay on one side, so a common prompt can move far more of
    them than requested.

    Raises:
        InputError: far more conversations than requested are held out.
    """
    data = text.data
    if data.validation is not None or not data.holds_conversations:
        return
    train, held_out = (tokens[name].tally.num_read for name in ("train", "validation"))
    if held_out > 50 and held_out > (3 * data.held_out + 0.05) * (train + held_out):
        raise InputError(
            f"{text.split.key}: {held_out:,} of {train + held_out:,} conversations would be held out, not "
            f"{data.held_out:.0%}, as many open with the same words and these are not split; name a validation source"
        )


def _spread(packed: PackedRows, data: DataSpec) -> np.ndarray:
    """Row numbers of the validation subset, evenly spaced. int64 [rows]

    In a mixture, each source gets the same fraction as in training, but at least one row.
    """
    parts, source, lengths = packed.tokens.parts, packed.source_of_rows(), packed.lengths()
    weights = [part.weight for part in parts] or [1]
    chosen = []
    for number, weight in enumerate(weights):
        rows = np.flatnonzero(source == number)
        if len(rows):
            tokens = data.sequence_length if data.packing in FULL else float(lengths[rows].mean())
            wanted = max(1, int(data.validation_tokens * weight / sum(weights) // tokens))
            chosen.append(rows[loader.evenly(len(rows), wanted)])
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
