"""A flat file of tokens seen as rows for a model, and the batch that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from distill.data.packing import TokenFile
from distill.data.rows import Span, document_spans, rows_of
from distill.data.spec import APART

if TYPE_CHECKING:
    from torch import Tensor

    from distill.data.spec import Packing


class Blocks(Dataset[dict[str, "Tensor"]]):
    """Rows of tokens; how the file is cut into them, and what a token of them sees, is told by ``packing``.

    Where a row is not full, end-of-text tokens that do not count fill it up.

    Args:
        tokens: the file.
        sequence_length: tokens in a row, at most.
        chosen: numbers of the rows to show, in order; None shows all.
        packing: see :mod:`distill.data.rows`.
    """

    def __init__(
        self,
        tokens: TokenFile,
        sequence_length: int,
        chosen: np.ndarray | None = None,
        *,
        packing: Packing = "wrapped",
    ):
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.packing = packing
        self.rows = rows_of(tokens, sequence_length, packing)
        self.chosen = np.arange(len(self.rows)) if chosen is None else chosen
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Tensor]:
        """The rows ``numbers`` as a batch; see :func:`batch_of`."""
        pieces = [self.pieces(number) for number in ([numbers] if isinstance(numbers, int) else numbers)]
        sizes = [sum(size for _, size in row) for row in pieces]
        width = max(sizes) if self.packing == "padded" else self.sequence_length
        ids = np.full((len(pieces), width), self.tokens.end, np.int64)
        for slot, row, size in zip(ids, pieces, sizes, strict=True):
            slot[:size] = np.concatenate([self._file()[start : start + count] for start, count in row])
        return batch_of(ids, pieces, apart=self.packing in APART)

    def pieces(self, number: int) -> list[Span]:
        """Where in the file the pieces of a row are; a token is predicted from those before it in its piece."""
        spans = self.rows.spans(int(self.chosen[number]))
        if self.packing != "documents":
            return spans
        return [
            document
            for start, size in spans
            for document in document_spans(self._file()[start : start + size], self.tokens.end, start)
        ]

    def only(self, numbers: np.ndarray) -> Blocks:
        """Some of the rows. numbers: int64 [rows]"""
        some = copy(self)
        some.chosen = self.chosen[numbers]
        return some

    def lengths(self) -> np.ndarray:
        """Tokens of text in each row. int64 [rows]"""
        return self.rows.lengths()[self.chosen]

    def block_bytes(self) -> np.ndarray:
        """UTF-8 bytes that the counted predictions of each row stand for. int64 [rows]"""
        sizes = self.tokens.bytes_of_tokens()
        # The first token of a piece is never predicted, so its bytes are not counted either.
        return np.array(
            [
                sum(int(sizes[start + 1 : start + size].sum(dtype=np.int64)) for start, size in self.pieces(number))
                for number in range(len(self))
            ],
            np.int64,
        )

    def num_predictions(self) -> int:
        """Predictions that count in all rows together."""
        return sum(size - 1 for number in range(len(self)) for _, size in self.pieces(number))

    def _file(self) -> np.ndarray:
        if self._ids is None:
            self._ids = self.tokens.ids()
        return self._ids

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ids": None}  # a worker maps the file itself, it is not sent to it


def batch_of(ids: np.ndarray, pieces: Sequence[Sequence[Span]], *, apart: bool) -> dict[str, Tensor]:
    """A batch from rows of ids.

    Args:
        ids: int64 [batch, sequence].
        pieces: of each row, as they follow each other in it; what comes after them is filling.
        apart: whether the pieces of a row must not see each other.

    Returns:
        ``input_ids`` int64 and ``mask`` bool, both [batch, sequence]; the mask is True where the next token belongs to
        the same piece. With ``apart`` also ``position_ids`` int64 [batch, sequence], which start anew with each piece:
        transformers takes that for the sign of a packed row and keeps attention inside each piece.
    """
    places = np.zeros(ids.shape, np.int64)
    for slot, row in zip(places, pieces, strict=True):
        run = np.concatenate([np.arange(size) for _, size in row])
        slot[: len(run)] = run
    mask = np.zeros(ids.shape, bool)
    mask[:, :-1] = places[:, 1:] > 0
    batch = {"input_ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}
    return batch | {"position_ids": torch.from_numpy(places)} if apart else batch
