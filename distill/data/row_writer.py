"""Writes the rows of a task to disk: texts as ids with their special tokens, and labels as numbers."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.core.artifact import replacing
from distill.core.batch import IGNORED
from distill.core.errors import InputError
from distill.core.seal import is_sealed, seal
from distill.core.tasks import MaskedLM, ModelTask, TokenClassification
from distill.data.base import Rejected
from distill.data.encoder import backend_of
from distill.data.first_tokens import around
from distill.data.labelled import Labelled, sorted_classes
from distill.data.tally import Tally
from distill.data.text_rows import IDS, RowFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE = 1024
"""Number of rows that the tokenizer is given at once."""


class RowWriter:
    """Encodes labelled rows as ids and writes them to disk.

    Args:
        task: the recipe's task.
        tokenizer: converts text to ids, with its special tokens.
        sequence_length: maximum number of tokens in a row.

    Raises:
        InputError: ``sequence_length`` leaves no room for text.
    """

    def __init__(self, task: ModelTask, tokenizer: PreTrainedTokenizerFast, sequence_length: int):
        self.task, self.sequence_length = task, sequence_length
        self._backend: Any = backend_of(tokenizer)
        self._backend.encode_special_tokens = True  # special tokens written out in a text are encoded as plain text
        self._gap = " " if _reads_spaces(self._backend) else ""
        self._before, self._after = around(tokenizer)
        self._room = sequence_length - len(self._before) - len(self._after)
        if self._room < 1:
            raise InputError(
                f"data.sequence_length ({sequence_length}) must be at least "
                f"{len(self._before) + len(self._after) + 1}, as the tokenizer puts so many tokens around a text and "
                "one more"
            )
        if not isinstance(task, MaskedLM):
            self._backend.enable_truncation(max_length=sequence_length)

    def write(
        self,
        folder: Path,
        items: Iterable[Labelled | Rejected],
        classes: Sequence[str] | None,
        what: str,
        repeated: Callable[[], int] = int,
    ) -> RowFile:
        """Read the rows if they are on disk, otherwise write them.

        Args:
            folder: folder of the rows.
            items: the rows, in order; not read if the folder is complete.
            classes: names in the order of the logits; None: those of the labels.
            what: key of the text in the recipe.
            repeated: returns the number of rows skipped because they are in the validation text; called after the last
                item.

        Raises:
            InputError: there is no usable row, or a class is not among ``classes``.
            MachineError: the folder cannot be written.
        """
        if is_sealed(folder):
            return RowFile.read(folder)
        if folder.exists():
            print(f"{folder.name}: not what was written; the text is tokenized again", file=sys.stderr)
        with replacing(folder) as place:
            file = self._write(place, items, classes, what, repeated)
            file.write(place)
            seal(place)
        return replace(file, path=str(folder))

    def _write(
        self,
        place: Path,
        items: Iterable[Labelled | Rejected],
        classes: Sequence[str] | None,
        what: str,
        repeated: Callable[[], int],
    ) -> RowFile:
        """Ids go to disk as they come; bounds and labels are small enough to be kept until the end."""
        bounds, seconds, labels = array("q", [0]), array("q"), list[Any]()
        tally, num_cut = Tally(), 0
        with (place / IDS).open("wb") as stream:
            for batch in _in_batches(self._used(items, tally)):
                for row, second, label, cut in self._rows(batch):
                    row.tofile(stream)
                    bounds.append(bounds[-1] + len(row))
                    seconds.append(second)
                    labels.append(label)
                    num_cut += cut
        if not labels:
            raise InputError(f"{what}: no row can be used" + (f": {tally.reasons()}" if tally.num_dropped else ""))
        found, targets = _targets(self.task, labels, classes, what)
        np.save(place / "bounds.npy", np.array(bounds, np.int64))
        if getattr(self.task, "text_pair", None) is not None:
            np.save(place / "seconds.npy", np.array(seconds, np.int64))
        if targets is not None:
            np.save(place / "targets.npy", targets)
        before, after = len(self._before), len(self._after)
        return RowFile("", len(labels), bounds[-1], num_cut, repeated(), before, after, found, tally)

    def _used(self, items: Iterable[Labelled | Rejected], tally: Tally) -> Iterator[Labelled]:
        for item in items:
            if isinstance(item, Rejected):
                tally.drop(item)
                if tally.is_hopeless():
                    return
                continue
            tally.note({})
            yield item

    def _rows(self, items: Sequence[Labelled]) -> Iterator[tuple[np.ndarray, int, Any, bool]]:
        """Yield (ids, tokens before the second text, label, whether the text was cut) of each row."""
        if isinstance(self.task, MaskedLM):
            for encoding in self._backend.encode_batch_fast([item.text for item in items], add_special_tokens=False):
                yield from self._pieces(np.array(encoding.ids, np.uint32))
            return
        if isinstance(self.task, TokenClassification):
            # as in " ".join(words)
            texts: list[Any] = [[*item.words[:1], *(self._gap + word for word in item.words[1:])] for item in items]
            encodings = self._backend.encode_batch(texts, is_pretokenized=True)
        else:
            texts = [item.first if item.second is None else (item.first, item.second) for item in items]
            encodings = self._backend.encode_batch(texts)
        for item, encoding in zip(items, encodings, strict=True):
            row = np.array(encoding.ids, np.uint32)
            label: Any = item.label
            if isinstance(self.task, TokenClassification):
                label = _of_first_tokens(encoding.word_ids, item.label)
            second = next((at for at, owner in enumerate(encoding.sequence_ids) if owner == 1), len(row))
            yield row, second, label, bool(encoding.overflowing)

    def _pieces(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int, None, bool]]:
        """Yield the rows of a text, which is cut into pieces that fill a row each with the special tokens around
        them."""
        for start in range(0, len(ids), self._room):
            piece = ids[start : start + self._room]
            row = np.concatenate([np.array(self._before, np.uint32), piece, np.array(self._after, np.uint32)])
            yield row, len(row), None, False


def _reads_spaces(backend: Any) -> bool:
    """Whether a token includes the space before its word, as in byte-level tokenizers of GPT-2 and RoBERTa.

    Such a tokenizer reads a word without a space as the end of the word before. Tokenizers that put a space before
    every text need none.
    """
    step = json.loads(backend.to_str())["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    return any(one.get("type") == "ByteLevel" and not one.get("add_prefix_space") for one in steps)


def _of_first_tokens(word_ids: Sequence[int | None], labels: Any) -> list[str | None]:
    """The class of the word at its first token; None at all other tokens."""
    found: list[str | None] = []
    last: int | None = None
    for word in word_ids:
        found.append(labels[word] if word is not None and word != last else None)
        last = word
    return found


def _targets(
    task: ModelTask, labels: Sequence[Any], classes: Sequence[str] | None, what: str
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """(names of the classes, targets on disk); no targets where the task has no labels."""
    if isinstance(task, TokenClassification):
        flat = [label for row in labels for label in row]
        names = tuple(classes or sorted_classes({label for label in flat if label is not None}))
        return names, _numbers(flat, names, what)
    if task.has_classes or isinstance(labels[0], str):
        names = tuple(classes or sorted_classes({*labels}))
        return names, _numbers(labels, names, what)
    if task.is_labelled:
        return (), np.array(labels, np.float32)
    return (), None


def _numbers(labels: Sequence[str | None], names: Sequence[str], what: str) -> np.ndarray:
    if not names:
        raise InputError(f"{what}: no word has a class; each of the two columns needs a list as long as the other")
    if len(names) < 2:
        raise InputError(f"{what}: all rows are of class {names[0]!r}; a classifier needs at least 2 classes")
    number = {name: at for at, name in enumerate(names)}
    if unknown := next((label for label in labels if label is not None and label not in number), None):
        raise InputError(
            f"{what}: class {unknown!r} is not among the {len(names)} classes ({', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}), which are those of the training data or of task.classes"
        )
    return np.array([IGNORED if label is None else number[label] for label in labels], np.int64)


def _in_batches(items: Iterator[Labelled]) -> Iterator[list[Labelled]]:
    while batch := [*islice(items, AT_ONCE)]:
        yield batch
