"""Text that is tokenized and packed as it is read, with a position to go on from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import IterableDataset

from distill.core.errors import InputError
from distill.data.base import Item, Rejected
from distill.data.encoder import TextEncoder
from distill.data.first_tokens import room_of
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import batch_of
from distill.data.packing import batches
from distill.data.rows import document_spans
from distill.data.split import Split
from distill.data.tally import Tally
from distill.data.token_writer import token_too_large

if TYPE_CHECKING:
    from torch import Tensor


TOKEN = np.dtype([("id", np.int64), ("place", np.int64)])
"""A token of a stream: its id, and its position in its document."""
ENOUGH = 200
"""Number of rows after which a run may stop because too many cannot be used, before the end of the pass."""


@dataclass(frozen=True)
class Stream:
    """The training side of a streamed source: an endless list of rows in the source's own order, pass after pass.

    The list depends on nothing but the text and the tokenizer. The end of a pass runs on into the next one, so every
    row is full. To start at a position is exact, and costs reading and tokenizing the text before it again.

    Attributes:
        split: which documents train.
        encoder: text to ids.
        sequence_length: tokens in a row.
        vocabulary_size: every id must be below it.
        apart: whether documents in a row must not see each other.
        max_dropped: share of the rows of a pass that may be left out as they cannot be used.
    """

    split: Split
    encoder: TextEncoder
    sequence_length: int
    vocabulary_size: int
    apart: bool = False
    max_dropped: float = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Rows from the first one on, each an array of :data:`TOKEN` [sequence], or of as many as fit in a row behind
        the tokens that the tokenizer puts before a text.

        Raises:
            InputError: a pass over the source holds less than one row, or an id that the model has no row for.
        """
        left, room = np.zeros(0, TOKEN), room_of(self.sequence_length, self.encoder.start)
        for number in count():
            num_tokens = 0
            for ids in self._ids():
                num_tokens += len(ids)
                tokens = np.concatenate([left, ids])  # TOKEN [tokens]
                whole = len(tokens) // room * room
                yield from tokens[:whole].reshape(-1, room)
                left = tokens[whole:]
            if number == 0 and num_tokens < self.sequence_length:
                raise InputError(
                    f"data.train: empty corpus: {num_tokens} tokens, expected at least one row "
                    f"(sequence_length {self.sequence_length}); give more text or shorter rows"
                )

    def _ids(self) -> Iterator[np.ndarray]:
        tally = Tally()
        for batch in batches(self._usable(tally)):
            for document, row in zip(batch, self.encoder.encode([each.text for each in batch]), strict=True):
                if (largest := int(row.max())) >= self.vocabulary_size:
                    raise InputError(token_too_large(document.id, largest, self.vocabulary_size))
                tokens = np.zeros(len(row), TOKEN)
                tokens["id"], tokens["place"] = row, np.arange(len(row))
                yield tokens

        tally.check("data.train", self.max_dropped)

    def _usable(self, tally: Tally) -> Iterator[Item]:
        """The documents of a pass. Rows that cannot be used are counted, and the first of each reason is printed.

        Raises:
            InputError: more of them than the recipe allows, as soon as that is sure.
        """
        for item in self.split.training():
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

        A row in the middle of a document gets the tokenizer's first tokens in front. A row that begins with a document
        already contains them, and is padded by as many tokens at its end.
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


class StreamBatches(IterableDataset[dict[str, "Tensor"]]):
    """Micro-batches of one rank from a stream, endlessly.

    Every rank reads the whole stream and takes its part. One worker at most may serve it, as two would each read all.

    Args:
        stream: the rows.
        taken: the positions that the rank takes.
    """

    def __init__(self, stream: Stream, taken: MicroBatches):
        self.stream, self.taken = stream, taken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows, read = iter(self.stream), 0
        for positions in self.taken:
            # the rows before are those of other ranks, or were consumed
            mine = list(islice(rows, positions.start - read, positions.stop - read))
            read = positions.stop
            yield self.stream.batch(np.stack(mine))
