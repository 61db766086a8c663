"""Tokenizes and packs a streamed text as it is read, with positions from which reading can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.core.errors import InputError
from distill.data.base import Item, Rejected
from distill.data.encoder import TextEncoder
from distill.data.first_tokens import room_of
from distill.data.packed_rows import batch_of
from distill.data.packing import batches
from distill.data.rows import document_spans
from distill.data.split import Split
from distill.data.tally import Tally
from distill.data.token_writer import token_too_large

if TYPE_CHECKING:
    from torch import Tensor


TOKEN = np.dtype([("id", np.uint32), ("place", np.uint32)])
"""A token of a stream: its id, and its position in its document."""
ENOUGH = 200
"""Number of rows after which a run may stop because too many are unusable, before the end of the pass."""


@dataclass(frozen=True)
class Position:
    """A position between two documents of a stream, from which reading can be resumed.

    Attributes:
        row: number of the next row.
        number: number of the pass over the source, from 0.
        num_tokens: number of tokens in the documents of this pass so far.
        source: position in the source; None: its start.
        left: tokens that do not fill a row yet. :data:`TOKEN` [tokens]
        tally: counts of the rows of this pass.
    """

    row: int = 0
    number: int = 0
    num_tokens: int = 0
    source: dict[str, Any] | None = None
    left: np.ndarray = field(default_factory=lambda: np.zeros(0, TOKEN))
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        """The position as a JSON value."""
        left = [self.left["id"].tolist(), self.left["place"].tolist()]
        return {
            "row": self.row,
            "number": self.number,
            "num_tokens": self.num_tokens,
            "source": self.source,
            "left": left,
            "tally": asdict(self.tally),
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Position:
        """The position from the value that :meth:`to_json` returned."""
        ids, places = written["left"]
        left = np.zeros(len(ids), TOKEN)
        left["id"], left["place"] = ids, places
        return cls(**{**written, "left": left, "tally": Tally(**written["tally"])})


@dataclass(frozen=True)
class Stream:
    """The training side of a streamed source: an endless list of rows in the source's own order, pass after pass.

    The list depends only on the text and the tokenizer. The last row of a pass continues with the next pass, so every
    row is full. Training reads the rows from disk, where a writer process stores them ahead of time; see
    :mod:`distill.data.stream_shards`.

    Attributes:
        split: decides which documents are trained on.
        encoder: converts text to ids.
        sequence_length: number of tokens in a row.
        vocabulary_size: every id must be below it.
        folder: folder of the rows on disk.
        apart: whether documents in a row must not see each other.
        max_dropped: largest share of unusable rows in a pass, which are left out.
    """

    split: Split
    encoder: TextEncoder
    sequence_length: int
    vocabulary_size: int
    folder: Path
    apart: bool = False
    max_dropped: float = 0.0

    @property
    def room(self) -> int:
        """Number of tokens of text in a row of the list: those that fit after the start tokens."""
        return room_of(self.sequence_length, self.encoder.start)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield rows from the first one on, each an array of :data:`TOKEN` [room].

        Raises:
            InputError: a pass over the source has less than one row of text, or a token id outside the model's
                vocabulary.
        """
        for rows, _ in self.read(Position()):
            yield from rows

    def read(self, begin: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Yield (rows, position after them) from ``begin`` on. rows: :data:`TOKEN` [rows, room]

        Raises:
            InputError: see :meth:`__iter__`.
        """
        self.split.prepare()
        room, source, at = self.room, self.split.data.train, begin
        while True:
            documents, state = source.open_at(at.source)
            tally = deepcopy(at.tally)
            for batch in batches(self._usable(self.split.trained_of(documents), tally)):
                tokens = np.concatenate([at.left, *self._ids(batch)])  # TOKEN [tokens]
                whole, num_new = len(tokens) // room * room, len(tokens) - len(at.left)
                rows, left = tokens[:whole].reshape(-1, room), tokens[whole:].copy()
                at = Position(at.row + len(rows), at.number, at.num_tokens + num_new, state(), left, deepcopy(tally))
                yield rows, at
            tally.check("data.train", self.max_dropped)
            if at.number == 0 and at.num_tokens < self.sequence_length:
                raise InputError(
                    f"data.train: empty corpus: {at.num_tokens} tokens, expected at least one row "
                    f"(sequence_length {self.sequence_length}); give more text or shorter rows"
                )
            at = Position(at.row, at.number + 1, left=at.left)

    def _ids(self, batch: Sequence[Item]) -> Iterator[np.ndarray]:
        """Yield the tokens of each document of a batch."""
        for document, row in zip(batch, self.encoder.encode([each.text for each in batch]), strict=True):
            if (largest := int(row.max())) >= self.vocabulary_size:
                raise InputError(token_too_large(document.id, largest, self.vocabulary_size))
            tokens = np.zeros(len(row), TOKEN)
            tokens["id"], tokens["place"] = row, np.arange(len(row))
            yield tokens

    def _usable(self, documents: Iterable[Item], tally: Tally) -> Iterator[Item]:
        """Yield the usable documents of a pass. Unusable rows are counted, and the first with each reason is printed.

        Raises:
            InputError: more rows are unusable than the recipe allows, checked from row :data:`ENOUGH` on.
        """
        for item in documents:
            if not isinstance(item, Rejected):
                tally.note({})
                yield item
                continue
            if item.reason not in tally.dropped:
                print(f"data.train: left out {item.id} and its like: {item.detail}", file=sys.stderr, flush=True)
            tally.drop(item)
            if tally.num_read >= ENOUGH:
                tally.check("data.train", self.max_dropped)

    def first(self, num_rows: int) -> np.ndarray:
        """The first rows of the list. :data:`TOKEN` [num_rows, tokens]"""
        return np.stack(list(islice(self, num_rows)))

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """A batch of rows; see :func:`distill.data.packed_rows.batch_of`. rows: :data:`TOKEN` [batch, tokens]

        A row that begins in the middle of a document gets the tokenizer's start tokens as a prefix. A row that begins
        with a document already contains them, and is padded by as many tokens at its end.
        """
        size, start = rows.shape[1], self.encoder.start
        ids = np.full((len(rows), size + len(start)), self.encoder.end, np.int64)  # [batch, sequence]
        counted = np.zeros(ids.shape, bool)
        pieces, leads = [], []
        for number, row in enumerate(rows):
            lead = min(int(row["place"][0]), len(start))
            ids[number, :lead], ids[number, lead : lead + size] = start[:lead], row["id"]
            counted[number, lead : lead + size] = row["place"] >= len(start)
            firsts = np.flatnonzero(row["place"] == 0) if self.apart else np.zeros(0, np.int64)
            pieces.append(document_spans(firsts, 0, size))
            leads.append([lead] + [0] * (len(pieces[-1]) - 1))
        return batch_of(ids, pieces, counted, apart=self.apart, leads=leads)
