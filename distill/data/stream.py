"""Text that is tokenised and packed as it is read, with a position to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import IterableDataset

from distill.core.errors import InputError
from distill.data.blocks import batch_of
from distill.data.encoder import Encoder
from distill.data.packing import batches, token_too_large
from distill.data.rows import document_spans
from distill.data.split import Split

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """The training side of a streamed source: an endless list of blocks in the source's own order, pass after pass.

    The list depends on nothing but the text and the tokenizer. The end of a pass runs on into the next one, so every
    block is full. To start at a position is exact, and costs reading and tokenising the text before it again.

    Attributes:
        split: which documents train.
        encoder: text to ids.
        sequence_length: tokens in a block.
        vocabulary_size: every id must be below it.
        apart: whether documents in a block must not see each other.
    """

    split: Split
    encoder: Encoder
    sequence_length: int
    vocabulary_size: int
    apart: bool = False

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks from the first one on. int64 [sequence]

        Raises:
            InputError: a pass over the source holds less than one block, or an id that the model has no row for.
        """
        left = np.zeros(0, np.int64)
        for number in count():
            num_tokens = 0
            for ids in self._ids():
                num_tokens += len(ids)
                tokens = np.concatenate([left, ids])
                whole = len(tokens) // self.sequence_length * self.sequence_length
                yield from tokens[:whole].reshape(-1, self.sequence_length)
                left = tokens[whole:]
            if number == 0 and num_tokens < self.sequence_length:
                raise InputError(
                    f"data.train: empty corpus: {num_tokens} tokens, expected at least one block "
                    f"(sequence_length {self.sequence_length}); give more text or shorter blocks"
                )

    def _ids(self) -> Iterator[np.ndarray]:
        for batch in batches(self.split.training()):
            for document, row in zip(batch, self.encoder.encode([each.text for each in batch]), strict=True):
                if max(row) >= self.vocabulary_size:
                    raise InputError(token_too_large(document.id, max(row), self.vocabulary_size))
                yield np.asarray(row, np.int64)

    def first(self, num_blocks: int) -> np.ndarray:
        """The first blocks of the list. int64 [num_blocks, sequence]"""
        return np.stack(list(islice(self, num_blocks)))

    def batch(self, blocks: np.ndarray) -> dict[str, Tensor]:
        """A batch of blocks; see :func:`distill.data.blocks.batch_of`. blocks: int64 [batch, sequence]"""
        whole = [[(0, blocks.shape[1])]] * len(blocks)
        pieces = [document_spans(row, self.encoder.end) for row in blocks] if self.apart else whole
        return batch_of(blocks, pieces, apart=self.apart)


class StreamBatches(IterableDataset[dict[str, "Tensor"]]):
    """Micro-batches of one rank from a stream; the positions are those of :class:`distill.data.loader.GlobalOrder`.

    Every rank reads the whole stream and takes its part. One worker at most may serve it, as two would each read all.

    Args:
        stream: the blocks.
        micro_batch_size: blocks for a rank in a micro-step.
        consumed_sequences: blocks that all ranks together have taken already.
        rank: this process.
        world_size: processes that share the stream.
        end_sequences: stop when so many are taken; None never stops.
    """

    def __init__(
        self,
        stream: Stream,
        micro_batch_size: int,
        consumed_sequences: int = 0,
        rank: int = 0,
        world_size: int = 1,
        end_sequences: int | None = None,
    ):
        self.stream = stream
        self.micro_batch_size = micro_batch_size
        self.consumed_sequences = consumed_sequences
        self.rank = rank
        self.world_size = world_size
        self.end_sequences = end_sequences

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step, position = self.micro_batch_size * self.world_size, self.consumed_sequences
        blocks = islice(self.stream, position, None)
        while self.end_sequences is None or position < self.end_sequences:
            everyone = list(islice(blocks, step))
            mine = everyone[self.rank * self.micro_batch_size : (self.rank + 1) * self.micro_batch_size]
            yield self.stream.batch(np.stack(mine))
            position += step
