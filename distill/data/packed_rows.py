"""A flat token file as rows for a model, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from distill.core.batch import causal_batch
from distill.data.packing import TokenFile
from distill.data.rows import Span, belongs_to_start, cut_into_rows, document_spans
from distill.data.spec import APART

if TYPE_CHECKING:
    from torch import Tensor

    from distill.data.spec import Packing


class PackedRows(Dataset[dict[str, "Tensor"]]):
    """Rows of tokens. ``packing`` decides how the file is cut into rows, and what each token sees.

    A row that is not full is padded with end-of-text tokens that do not count.

    Args:
        tokens: the token file.
        sequence_length: maximum number of tokens in a row.
        chosen: numbers of the rows to use, in order; None: all.
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
        self.rows = cut_into_rows(tokens, sequence_length, packing)
        self.chosen = np.arange(len(self.rows)) if chosen is None else chosen
        self._ids: np.ndarray | None = None
        self._bounds: np.ndarray | None = None
        self._learned: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Tensor]:
        """The rows ``numbers`` as a batch; see :func:`batch_of`."""
        rows = [
            (self.pieces(number), self.leads(number)) for number in ([numbers] if isinstance(numbers, int) else numbers)
        ]
        sizes = [sum(size for _, size in pieces) + sum(leads) for pieces, leads in rows]
        width = max(sizes) if self.packing == "padded" else self.sequence_length
        file, start = self._file(), np.asarray(self.tokens.start, np.int64)
        ids = np.full((len(rows), width), self.tokens.filling, np.int64)  # [batch, sequence]
        learned = np.ones(ids.shape, bool)
        for number, ((pieces, leads), size) in enumerate(zip(rows, sizes, strict=True)):
            spans = [(slice(at, at + count), lead) for (at, count), lead in zip(pieces, leads, strict=True)]
            ids[number, :size] = np.concatenate([part for span, lead in spans for part in (start[:lead], file[span])])
            if self._learned is not None or len(start):
                counted = [(self._counted(np.arange(span.start, span.stop)), lead) for span, lead in spans]
                learned[number, :size] = np.concatenate([np.pad(which, (lead, 0)) for which, lead in counted])
        pieces_of_rows, leads_of_rows = [pieces for pieces, _ in rows], [leads for _, leads in rows]
        return batch_of(ids, pieces_of_rows, learned, apart=self.packing in APART, leads=leads_of_rows)

    def pieces(self, number: int) -> list[Span]:
        """Spans of the pieces of a row in the file; a token is predicted from the tokens before it in its piece."""
        spans = self.rows.spans(int(self.chosen[number]))
        if self.packing != "documents":
            return spans
        self._file()
        assert self._bounds is not None
        return [document for span in spans for document in document_spans(self._bounds, *span)]

    def leads(self, number: int) -> list[int]:
        """Number of start tokens that are inserted before each piece of a row."""
        leads = self.rows.leads_in(int(self.chosen[number]))
        # only the first piece of a row can start inside its document; the others start at the beginning of theirs
        return leads + [0] * (len(self.pieces(number)) - 1) if self.packing == "documents" else leads

    def columns(self, number: int) -> np.ndarray:
        """Column of each token of a row's pieces in the row. int64 [tokens of the file]"""
        sizes, leads = np.array([size for _, size in self.pieces(number)]), np.array(self.leads(number))
        return np.arange(sizes.sum()) + np.repeat(np.cumsum(leads), sizes)

    def predicted(self, number: int) -> np.ndarray:
        """Positions in the file of a row's counted targets, in the row's order. int64 [predictions]"""
        # the first token of a piece has no text before it from which it could be predicted
        places = np.concatenate([np.arange(start + 1, start + size) for start, size in self.pieces(number)])
        self._file()
        return places[self._counted(places)] if self._learned is not None or self.tokens.start else places

    def _counted(self, places: np.ndarray) -> np.ndarray:
        """Whether each of the given tokens of the file counts as a target. bool [places]"""
        assert self._ids is not None
        assert self._bounds is not None
        counted = ~belongs_to_start(self.tokens.start, self._bounds, self._ids, places)
        return counted if self._learned is None else counted & self._learned[places]

    def only(self, numbers: np.ndarray) -> PackedRows:
        """A subset of the rows. numbers: int64 [rows]"""
        some = copy(self)
        some.chosen = self.chosen[numbers]
        return some

    def originals(self) -> PackedRows:
        """The rows without copies that ``data.augment`` added."""
        files = [part.tokens for part in self.tokens.parts] or [self.tokens]
        if not any(file.tally.copies for file in files):
            return self
        begins = np.cumsum([0, *(file.num_tokens for file in files[:-1])])
        limits = begins + [file.end_of_originals() for file in files]  # [sources]
        ends = np.maximum.reduceat(self.rows.starts + self.rows.sizes, self.rows.bounds[:-1])[self.chosen]  # [rows]
        return self.only(np.flatnonzero(ends <= limits[self.source_of_rows()]))

    def lengths(self) -> np.ndarray:
        """Number of tokens in each row, without padding. int64 [rows]"""
        return self.rows.lengths()[self.chosen]

    def source_of_rows(self) -> np.ndarray:
        """Number of the part of the file that each row is from; 0 if there is only one text. int64 [rows]"""
        ends = np.cumsum([part.tokens.num_tokens for part in self.tokens.parts] or [self.tokens.num_tokens])
        return np.searchsorted(ends, self.rows.starts[self.rows.bounds[self.chosen]], "right")

    def bytes_of_rows(self) -> np.ndarray:
        """UTF-8 bytes of text that the counted predictions of each row cover. int64 [rows]"""
        sizes = self.tokens.bytes_of_tokens()  # [tokens]
        return np.array([sizes[self.predicted(number)].sum(dtype=np.int64) for number in range(len(self))], np.int64)

    def ids(self) -> np.ndarray:
        """The tokens of the file, memory-mapped. [tokens]"""
        return self.tokens.ids()

    def learned(self) -> np.ndarray | None:
        """Which tokens of the file are learned from, memory-mapped; None: all. bool [tokens]"""
        self._file()
        return self._learned

    def num_predictions(self) -> int:
        """Number of predictions that count in all rows together."""
        return sum(len(self.predicted(number)) for number in range(len(self)))

    def _file(self) -> np.ndarray:
        if self._ids is None:
            self._ids, self._bounds, self._learned = self.tokens.ids(), self.tokens.bounds(), self.tokens.learned()
        return self._ids

    def __getstate__(self) -> dict[str, Any]:
        # each worker maps the files itself
        return self.__dict__ | {"_ids": None, "_bounds": None, "_learned": None}


def batch_of(
    ids: np.ndarray,
    pieces: Sequence[Sequence[Span]],
    learned: np.ndarray,
    *,
    apart: bool,
    leads: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """A batch from rows of ids, with its targets and mask.

    Args:
        ids: int64 [batch, sequence].
        pieces: per row, the (start, size) spans in order; the rest of the row is padding.
        learned: which tokens are learned from, bool [batch, sequence].
        apart: whether the pieces of a row must not see each other.
        leads: number of prefix tokens inserted before each piece; None: none.

    Returns:
        See :mod:`distill.core.batch`. The mask is True where the next token belongs to the same piece and is learned
        from. With ``apart`` there are ``position_ids``, which restart at each piece: by this, transformers recognises a
        packed row and restricts attention to each piece.
    """
    leads = leads or [[0] * len(row) for row in pieces]
    places = np.zeros(ids.shape, np.int64)  # [batch, sequence], position in its piece, with the prefix
    predictable = np.zeros(ids.shape, bool)  # [batch, sequence]
    for number, (row, before) in enumerate(zip(pieces, leads, strict=True)):
        # [tokens of the row]
        run = np.concatenate([np.arange(lead + size) for (_, size), lead in zip(row, before, strict=True)])
        places[number, : len(run)] = run
        # the prefix tokens say nothing about the text before the piece, so its first token is not predicted from them
        first = np.repeat(before, [lead + size for (_, size), lead in zip(row, before, strict=True)])
        predictable[number, : len(run)] = run > first
    mask = np.zeros(ids.shape, bool)
    mask[:, :-1] = predictable[:, 1:] & learned[:, 1:]
    more = {"position_ids": torch.from_numpy(places)} if apart else {}
    return causal_batch(torch.from_numpy(ids), torch.from_numpy(mask), **more)
