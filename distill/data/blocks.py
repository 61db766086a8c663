"""A flat file of tokens seen as blocks of equal length, and the batch that a model gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from distill.data.packing import TokenFile

if TYPE_CHECKING:
    from torch import Tensor


class Blocks(Dataset[dict[str, "Tensor"]]):
    """Block ``i`` holds the tokens ``[i * sequence_length, (i + 1) * sequence_length)``; documents run
    on from one block to the next.

    The last block is filled up with end-of-text tokens that do not count. A token alone in it is left out: there is
    nothing before it that could predict it.

    Args:
        tokens: the file.
        sequence_length: tokens in a block.
        chosen: numbers of the blocks to show, in order; None shows all.
    """

    def __init__(self, tokens: TokenFile, sequence_length: int, chosen: np.ndarray | None = None):
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.chosen = np.arange(-(-(tokens.num_tokens - 1) // sequence_length)) if chosen is None else chosen
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Tensor]:
        """The blocks ``numbers`` as a batch: input_ids int64 and mask bool, both [batch, sequence]."""
        if self._ids is None:
            self._ids = self.tokens.ids()
        length = self.sequence_length
        numbers = [numbers] if isinstance(numbers, int) else numbers
        ids = np.full((len(numbers), length), self.tokens.end, np.int64)
        sizes = np.empty(len(numbers), np.int64)
        for row, number in enumerate(numbers):
            start = int(self.chosen[number]) * length
            piece = self._ids[start : start + length]
            ids[row, : len(piece)] = piece
            sizes[row] = len(piece)
        return batch_of(ids, sizes)

    def block_bytes(self) -> np.ndarray:
        """UTF-8 bytes that the counted predictions of each block stand for. int64 [blocks]"""
        length = self.sequence_length
        sizes = self.tokens.bytes_of_tokens()
        starts = [int(number) * length for number in self.chosen]
        # The first token of a block is never predicted, so its bytes are not counted either.
        return np.array([sizes[start + 1 : start + length].sum(dtype=np.int64) for start in starts], np.int64)

    def num_predictions(self) -> int:
        """Predictions that count in all blocks together."""
        left = self.tokens.num_tokens - self.chosen * self.sequence_length
        return int(np.sum(np.minimum(left, self.sequence_length) - 1))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ids": None}  # a worker maps the file itself, it is not sent to it


def batch_of(ids: np.ndarray, sizes: np.ndarray) -> dict[str, Tensor]:
    """A batch from rows of ids of which the first ``sizes[row]`` are text. ids: int64 [batch, sequence]."""
    positions = np.arange(ids.shape[1])
    mask = positions[None, :] < sizes[:, None] - 1
    return {"input_ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}


def document_ids(input_ids: Tensor, end: int) -> Tensor:
    """Number of the document that each token of a block belongs to, from 0 in each row; its end belongs to it too.

    Args:
        input_ids: int64 [batch, sequence].
        end: id that ends a document.

    Returns:
        int64 [batch, sequence].
    """
    ended = (input_ids == end).long()
    return ended.cumsum(1) - ended
