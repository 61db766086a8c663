"""The text of a run, opened once: tokens on disk, blocks of them, and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.data import loader
from distill.data.blocks import Blocks
from distill.data.encoder import Encoder
from distill.data.packing import TokenFile, alone, read_tokens, token_too_large, write_tokens
from distill.data.spec import FULL, DataSpec
from distill.data.split import Split
from distill.data.stream import Stream
from distill.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.data.loader import Batches


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as blocks of token ids. Make it with :meth:`open`.

    Attributes:
        train: training blocks: a finite set, or a stream whose source is read as it comes.
        validation: validation blocks, at most the tokens that the recipe asks for, spread over the validation text.
        seed: decides the order of training.
        calibration_sequences: blocks for calibration.
        hash: stands for the text, the split, the tokenizer and the blocks; equal hash and seed, equal order.
    """

    train: Blocks | Stream
    validation: Blocks
    seed: int
    calibration_sequences: int
    hash: str

    @classmethod
    def open(
        cls, data: DataSpec, tokenizer: PreTrainedTokenizerFast, folder: str | Path, seed: int, vocabulary_size: int
    ) -> Corpus:
        """Tokenise what is not tokenised yet, and open it.

        Processes that open the same folder at once wait for the one that came first and use its work.

        Args:
            data: the recipe's ``data`` section.
            tokenizer: text to ids.
            folder: where tokens are kept, such as ``<run>/data``.
            seed: decides the order of training.
            vocabulary_size: rows of the smallest model head that will see the ids.

        Raises:
            InputError: no text, too little text, or ids that the models have no rows for.
            MachineError: the folder cannot be written.
        """
        folder, encoder, split = Path(folder), Encoder(tokenizer), Split(data)
        key = _key(data, encoder, tokenizer)
        with alone(folder):
            tokens = {
                name: read_tokens(folder / f"{name}-{key}.bin")
                or _tokenise(folder / f"{name}-{key}.bin", name, data, split, encoder, vocabulary_size)
                for name in (["validation"] if data.train.is_stream() else ["train", "validation"])
            }
        _check(tokens, data, vocabulary_size)
        everything = Blocks(tokens["validation"], data.sequence_length, packing=data.packing)
        validation = everything.only(_spread(everything, data))
        train: Blocks | Stream
        if data.train.is_stream():
            train = Stream(split, encoder, data.sequence_length, vocabulary_size, data.packing == "documents")
            train.first(1)  # an empty stream is found now, not in the middle of a run
        else:
            train = Blocks(tokens["train"], data.sequence_length, packing=data.packing)
        identity = hash_of(key, data.sequence_length, data.packing, data.validation_tokens)
        return cls(train, validation, seed, data.calibration_sequences, identity)

    def train_loader(
        self,
        micro_batch_size: int,
        consumed_sequences: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        end_sequences: int | None = None,
    ) -> Batches:
        """Micro-batches for training from a position on.

        Args:
            micro_batch_size: blocks in a batch.
            consumed_sequences: blocks that all ranks together have trained on: the position to go on from.
            rank: this process.
            world_size: processes that train together.
            num_workers: processes that read ahead; a stream uses one at most. Changes nothing in the order.
            end_sequences: stop at this position (the loader then has a length, unless it streams); None is endless.
        """
        where = (micro_batch_size, consumed_sequences, rank, world_size)
        if isinstance(self.train, Stream):
            return loader.stream_batches(self.train, *where, num_workers, end_sequences)
        return loader.train_batches(self.train, self.seed, *where, num_workers, end_sequences)

    def validation_loader(self, batch_size: int, num_workers: int = 0, num_sequences: int | None = None) -> Batches:
        """Every validation block, or so many evenly spread over the text, once, in a fixed order."""
        return loader.validation_batches(self.validation, batch_size, num_workers, num_sequences)

    def calibration_loader(self, num_sequences: int | None = None, batch_size: int = 8) -> Batches:
        """Training blocks for calibration, the same each time; ``num_sequences`` None takes what the recipe says.

        The seed chooses them; of a stream they are the first ones. All blocks when there are fewer.
        """
        return loader.calibration_batches(
            self.train, self.seed, num_sequences or self.calibration_sequences, batch_size
        )

    @cached_property
    def tokens_per_sequence(self) -> float:
        """Tokens of text in a training block, on average."""
        if isinstance(self.train, Stream) or self.train.packing in FULL:
            return self.train.sequence_length  # but for the last one
        return float(self.train.lengths().mean())

    @cached_property
    def validation_bytes(self) -> int:
        """UTF-8 bytes that the counted predictions of :meth:`validation_loader` stand for, exactly.

        Bits per byte = summed loss in nats / ln 2 / this. The end of a document is predicted but stands for no bytes.
        """
        return int(self.validation.block_bytes().sum())

    def summary(self) -> str:
        """One line for people."""
        validation = self.validation
        return (
            f"{_described(self.train)}; validation {len(validation):,} blocks, {validation.num_predictions():,} "
            f"predictions, {self.validation_bytes:,} bytes"
        )


def _described(train: Blocks | Stream) -> str:
    if isinstance(train, Stream):
        return f"train: a stream in blocks of {train.sequence_length}"
    tokens = train.tokens
    line = (
        f"train {tokens.num_documents:,} documents, {tokens.num_tokens:,} tokens "
        f"({tokens.num_bytes / tokens.num_tokens:.2f} bytes each), {len(train):,} blocks of {train.sequence_length}"
    )
    if train.packing not in FULL:
        line += f" at most, {train.lengths().mean():.0f} tokens of text in each"
    repeated = tokens.num_repeated
    return line + (f", {repeated:,} documents left out as validation has them" if repeated else "")


def open_tokenizer(data: DataSpec, teacher: str, folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a recipe names; one that is to be trained is kept in ``folder`` and trained once.

    Args:
        data: the recipe's ``data`` section.
        teacher: where the teacher is: folder or Hub id.
        folder: where a trained tokenizer goes, such as ``<run>/data``.

    Raises:
        InputError: it cannot be loaded, or there is no text to train it on.
        MachineError: the folder cannot be written.
    """
    if isinstance(data.tokenizer, str):
        return load_tokenizer(teacher if data.tokenizer == "teacher" else data.tokenizer)
    held_out = data.held_out if data.validation is None else data.validation.fingerprint()
    key = hash_of(data.train.fingerprint(), held_out, data.tokenizer.vocab_size)
    place = Path(folder) / f"tokenizer-{key}"
    with alone(Path(folder)):
        if not (place / "tokenizer.json").is_file():
            texts = (document.text for document in Split(data).training())
            train_tokenizer(texts, data.tokenizer.vocab_size, place)
    return load_tokenizer(place)


def _key(data: DataSpec, encoder: Encoder, tokenizer: PreTrainedTokenizerFast) -> str:
    """Stands for all that decides which ids are in the token files."""
    validation = data.validation or data.train
    return hash_of(
        data.train.fingerprint(),
        data.validation.fingerprint() if data.validation else data.held_out,
        data.validation_tokens if validation.is_stream() else None,
        tokenizer_hash(tokenizer),
        encoder.start,
    )


def _tokenise(path: Path, name: str, data: DataSpec, split: Split, encoder: Encoder, vocabulary_size: int) -> TokenFile:
    if name == "validation":
        total = data.validation.num_bytes() if data.validation else None
        return write_tokens(path, split.validation(), encoder, vocabulary_size, with_bytes=True, total_bytes=total)
    return write_tokens(
        path,
        split.training(),
        encoder,
        vocabulary_size,
        total_bytes=data.train.num_bytes(),
        num_repeated=lambda: split.num_repeated,
    )


def _check(tokens: dict[str, TokenFile], data: DataSpec, vocabulary_size: int) -> None:
    """Refuse ids without a row in the model, and too little text."""
    for name, file in tokens.items():
        # Said here too, as the file may have been written for a larger model.
        if file.largest >= vocabulary_size:
            raise InputError(token_too_large(f"data.{name}", file.largest, vocabulary_size))
        cut = name == "train" and data.packing in FULL
        needed = data.sequence_length if cut else 2
        if file.num_tokens < needed:
            raise InputError(
                f"data.{name}: empty corpus: {file.num_tokens} tokens in {file.num_documents} documents, expected at "
                f"least {needed}; give more text" + (f" or shorter blocks (sequence_length {needed})" * cut)
            )


def _spread(blocks: Blocks, data: DataSpec) -> np.ndarray:
    """Numbers of the validation blocks to use: evenly over all, so that one end of the text does not stand for it."""
    full = data.packing in FULL
    tokens = data.sequence_length if full else float(blocks.lengths().mean())
    wanted = min(len(blocks), max(1, int(data.validation_tokens // tokens)))
    return np.arange(wanted) * len(blocks) // wanted
