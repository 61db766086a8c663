"""The data of a run with a task other than the next token: labelled rows, masked rows or texts to embed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.tasks import MaskedLM, ModelTask, TokenClassification
from distill.data import loader
from distill.data.corpus import Corpus
from distill.data.labelled import labelled
from distill.data.masking import Masking
from distill.data.micro_batches import MicroBatches
from distill.data.order import GlobalOrder, shuffled
from distill.data.packing import file_lock
from distill.data.row_writer import RowWriter
from distill.data.spec import DataSpec
from distill.data.split import RULE, Split
from distill.data.text_rows import PlacesOf, RowFile, TextRows
from distill.data.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from distill.data.base import Item, SourceSpec
    from distill.data.loader import Batches


@dataclass(frozen=True)
class TaskCorpus(Corpus):
    """Training and validation rows of a task. Make it with :func:`open_rows`.

    Attributes:
        train, validation: see :class:`~distill.data.text_rows.TextRows`.
        task: the recipe's task.
        questions: hash of the text of the validation rows. It is the same for all tokenizers, so that results of models
            with different tokens can be compared row by row.
    """

    train: TextRows  # type: ignore[assignment]
    validation: TextRows  # type: ignore[assignment]
    task: ModelTask = field(default_factory=MaskedLM)
    questions: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; none where the task has no classes."""
        return self.train.file.classes if self.task.has_classes else ()

    def by_source(self) -> dict[str, Corpus]:
        """Empty: these rows are from one source."""
        return {}

    def train_loader(
        self, taken: MicroBatches, num_workers: int = 0, num_sequences: int = 0, losses: np.ndarray | None = None
    ) -> Batches:
        """Loader of micro-batches for training, endless; rows of similar length follow each other."""
        order = GlobalOrder(len(self.train), self.seed, taken, self.train.lengths())
        return loader.loader(self.train, PlacesOf(order), num_workers)

    def validation_loader(self, batch_size: int, num_sequences: int | None = None) -> Batches:
        """Loader of every validation row, or of ``num_sequences`` evenly spread rows; once, in a fixed order: by
        length.

        :meth:`validation_order` returns their numbers.
        """
        return loader.loader(self.validation, loader.in_lists(self.validation_order(num_sequences), batch_size), 0)

    def validation_order(self, num_sequences: int | None = None) -> np.ndarray:
        """Numbers of the validation rows in the order of :meth:`validation_loader`. int64 [rows]"""
        return loader.alike(self.validation, loader.evenly(len(self.validation), num_sequences))

    def calibration_loader(self, num_sequences: int | None = None, batch_size: int = 8) -> Batches:
        """Loader of training rows for calibration, always the same."""
        wanted = num_sequences or self.calibration_sequences
        chosen = shuffled(len(self.train), self.seed, "calibration")[:wanted].numpy()
        return loader.loader(self.train, loader.in_lists(loader.alike(self.train, chosen), batch_size), 0)

    @cached_property
    def tokens_per_sequence(self) -> float:
        """Average number of tokens in a training row."""
        return float(self.train.lengths().mean())

    def passes(self, num_sequences: float) -> dict[str, float]:
        """Empty: these rows are from one source."""
        return {}

    @cached_property
    def validation_bytes(self) -> int | None:  # type: ignore[override]
        """None: predictions of a task do not correspond to bytes of text."""
        return None

    def summary(self) -> str:
        """Summary for the user: number of rows, tokens and classes."""
        train, validation = self.train, self.validation
        classes = f", {len(self.classes)} classes ({', '.join(self.classes[:8])}{', ...' * (len(self.classes) > 8)})"
        shown = f"{len(validation):,}"
        if len(validation) < validation.file.num_rows:
            shown += f" of {validation.file.num_rows:,} rows (data.validation_tokens)"
        else:
            shown += " rows"
        line = (
            f"train {len(train):,} rows, {train.lengths().mean():.0f} tokens in each{classes if self.classes else ''}; "
            f"validation {shown}, {validation.num_predictions():,} predictions"
        )
        return "\n".join([line, *self.notes()])

    def notes(self) -> list[str]:
        """Notes for the user, one line each: what was cut, repeated or left out."""
        lines = []
        for key, rows in (("data.train", self.train), ("data.validation", self.validation)):
            file = rows.file
            if file.num_cut:
                lines.append(
                    f"{key}: {file.num_cut:,} of {file.num_rows:,} texts are longer than data.sequence_length and are "
                    "cut there"
                )
            if file.num_repeated:
                lines.append(
                    f"{key}: {file.num_repeated:,} rows left out as validation has them, but for case and spaces"
                )
            lines += file.tally.lines(key)
        return lines


def open_rows(
    data: DataSpec, tokenizer: PreTrainedTokenizerFast, folder: str | Path, seed: int, vocabulary_size: int
) -> TaskCorpus:
    """Tokenize what is not tokenized yet, and open it; see :meth:`Corpus.open`.

    Args:
        data: the recipe's ``data`` section, with a task other than the next token.
        tokenizer: converts text to ids, with its special tokens.
        folder: where rows are stored, such as ``<run>/data``.
        seed: decides the order of training, and which tokens are masked.
        vocabulary_size: number of rows of the smallest embedding table among the models that use the ids.

    Raises:
        InputError: no text, too many unusable rows, unknown classes, or a tokenizer without the tokens of the task.
        MachineError: the folder cannot be written.
    """
    task, place = data.task, Path(folder)
    _check_tokenizer(tokenizer, task)
    writer = RowWriter(task, tokenizer, data.sequence_length)
    key = hash_of(
        data.train.identity(),
        data.split_identity(),
        tokenizer_hash(tokenizer),
        task.model_dump(mode="json", exclude={"mask", "positions", "pooling", "normalize"}),
        data.sequence_length,
        RULE,
        "rows 3",
    )

    def read(source: SourceSpec) -> Iterator[Item]:
        return labelled(source, task, "data.validation" if source is data.validation else "data.train")

    split, files = Split(data, read=read), dict[str, RowFile]()
    classes = getattr(task, "classes", None)
    with file_lock(place):
        for side, items in (("train", split.training), ("validation", split.validation)):
            items_of = cast("Iterator", items())
            repeated = partial(getattr, split, "num_repeated") if side == "train" else int
            file = writer.write(place / f"rows-{side}-{key}", items_of, classes, f"data.{side}", repeated)
            file.tally.check(f"data.{side}", data.max_dropped)
            files[side] = file
            classes = classes or file.classes or None
    largest = max(int(file.array("ids").max()) for file in files.values())
    if largest >= vocabulary_size:
        raise InputError(f"data: token {largest} lies outside the vocabulary of {vocabulary_size} tokens")
    filling = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    masking = _masking(task, tokenizer, seed, files["train"])
    train, every = (TextRows(files[side], task, int(filling), masking) for side in ("train", "validation"))
    validation = every.only(_spread(every, data.validation_tokens))
    if not validation.num_predictions():
        raise InputError("data.validation: nothing to measure on: no token is predicted; give more or longer texts")
    identity = hash_of(key, task.model_dump(mode="json"), data.validation_tokens)
    questions = hash_of(data.train.identity(), data.split_identity())
    return TaskCorpus(train, validation, seed, data.calibration_sequences, identity, task=task, questions=questions)


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, task: ModelTask) -> None:
    if isinstance(task, MaskedLM) and tokenizer.mask_token_id is None:
        raise InputError(
            "task: masked_lm needs a tokenizer with a mask token, which this one does not have; set data.tokenizer to "
            "that of an encoder such as BERT"
        )
    if isinstance(task, TokenClassification) and not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        raise InputError("task: token_classification: the tokenizer makes no token of a word; choose another one")


def _masking(task: ModelTask, tokenizer: PreTrainedTokenizerFast, seed: int, file: RowFile) -> Masking | None:
    if not isinstance(task, MaskedLM):
        return None
    counts = np.bincount(file.array("ids"), minlength=len(tokenizer))
    return Masking.of(task.mask, seed, int(tokenizer.mask_token_id), [*tokenizer.all_special_ids], counts)


def _spread(rows: TextRows, num_tokens: int) -> np.ndarray:
    """Numbers of the validation rows to use, evenly spaced, with about ``num_tokens`` tokens at most."""
    return loader.evenly(len(rows), max(1, int(num_tokens // rows.lengths().mean())))
