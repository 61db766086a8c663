"""Cuts a flat token file into rows: which pieces of it are in which row.

    wrapped     documents end to end, cut every ``sequence_length`` tokens; a token sees the documents before its own
    documents   the same rows, but a token sees only its own document
    best_fit    whole documents side by side, as many as fit; only one that is longer than a row is cut
    padded      one document per row (a longer one is cut), in batches of like length, padded to the longest

If the tokenizer puts tokens before a text, a piece that begins in the middle of its document gets them as a prefix, and
holds that many fewer tokens of text; see :mod:`distill.data.first_tokens`.

``best_fit`` is best-fit decreasing: the longest piece first, each into the fullest row that still has space for it. It
cuts fewer documents than ``wrapped``, and wastes much less space than padding. Source: Ding et al. 2024,
arXiv 2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from distill.data.first_tokens import room_of
from distill.data.spec import FULL

if TYPE_CHECKING:
    from distill.data.packing import TokenFile
    from distill.data.spec import Packing

Span = tuple[int, int]
"""First token of a piece, and its number of tokens."""


@dataclass(frozen=True)
class RowPieces:
    """The pieces of every row. Row ``r`` holds the pieces ``bounds[r]`` up to ``bounds[r + 1]``.

    Attributes:
        starts: int64 [pieces], the first token of each in the file.
        sizes: int64 [pieces], at least two tokens.
        bounds: int64 [rows + 1].
        leads: int64 [pieces], number of start tokens inserted before each.
    """

    starts: np.ndarray
    sizes: np.ndarray
    bounds: np.ndarray
    leads: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def spans(self, row: int) -> list[Span]:
        """The pieces of a row, in order."""
        some = slice(self.bounds[row], self.bounds[row + 1])
        return list(zip(self.starts[some].tolist(), self.sizes[some].tolist(), strict=True))

    def leads_in(self, row: int) -> list[int]:
        """Number of start tokens inserted before each piece of a row."""
        leads: list[int] = self.leads[self.bounds[row] : self.bounds[row + 1]].tolist()
        return leads

    def lengths(self) -> np.ndarray:
        """Number of tokens in each row, including inserted start tokens. int64 [rows]"""
        return np.add.reduceat(self.sizes + self.leads, self.bounds[:-1]) if len(self) else self.sizes


def cut_into_rows(tokens: TokenFile, sequence_length: int, packing: Packing) -> RowPieces:
    """Cut a file into rows of at most ``sequence_length`` tokens.

    A token alone in its piece is left out, because nothing precedes it from which it could be predicted. A row of a
    mixture holds text of one source only.

    Raises:
        InputError: ``sequence_length`` is too short for the tokenizer's first tokens.
    """
    if tokens.parts:
        return _of_parts([(part.tokens, cut_into_rows(part.tokens, sequence_length, packing)) for part in tokens.parts])
    room = room_of(sequence_length, tokens.start)
    if packing in FULL:
        # all rows hold `room` tokens of text, so a row that begins with a document has unused space
        starts = np.arange(0, tokens.num_tokens - 1, room)  # [rows], a piece each
        sizes = np.minimum(tokens.num_tokens - starts, room)
    else:
        starts, sizes = _cut(tokens, sequence_length, room)
    leads = leads_of(tokens.start, tokens.bounds(), starts)
    if packing != "best_fit":
        return RowPieces(starts, sizes, np.arange(len(starts) + 1), leads)
    row_of = best_fit(sizes + leads, sequence_length)  # [pieces]
    order = np.argsort(row_of, kind="stable")
    bounds = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
    return RowPieces(starts[order], sizes[order], bounds, leads[order])


def _of_parts(parts: list[tuple[TokenFile, RowPieces]]) -> RowPieces:
    """The rows of all parts of a file, each of which counts from its own first token."""
    first, starts, bounds = 0, [], [np.zeros(1, np.int64)]
    for tokens, rows in parts:
        starts.append(rows.starts + first)
        bounds.append(rows.bounds[1:] + bounds[-1][-1])
        first += tokens.num_tokens
    sizes, leads = (np.concatenate([getattr(rows, name) for _, rows in parts]) for name in ("sizes", "leads"))
    return RowPieces(np.concatenate(starts), sizes, np.concatenate(bounds), leads)


def _cut(tokens: TokenFile, length: int, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of all documents. Those longer than a row are cut into a piece of ``length`` tokens, then
    ``room`` each."""
    bounds = np.asarray(tokens.bounds())  # [documents + 1]
    firsts, ends = bounds[:-1], bounds[1:]
    pieces = 1 + np.maximum(-(-(ends - firsts - length) // room), 0)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(firsts, pieces) + np.where(number, length + (number - 1) * room, 0)
    sizes = np.minimum(np.repeat(ends, pieces) - starts, np.where(number, room, length))
    return starts[sizes > 1], sizes[sizes > 1]


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Row of each piece; rows are numbered in the order of their first pieces.

    Args:
        sizes: tokens of each piece, at most ``length``. int64 [pieces]
        length: capacity of a row in tokens.
    """
    row_of = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms: list[int] = []  # free capacities for which rows exist, ascending
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fullest = bisect_left(rooms, size)
        if fullest < len(rooms):
            room = rooms[fullest]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[fullest]
        else:
            room, row, num_rows = length, num_rows, num_rows + 1
        row_of[piece] = row
        if not with_room[room - size]:
            insort(rooms, room - size)
        with_room[room - size].append(row)
    _, first_seen, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_seen))[row_of]


def document_spans(bounds: np.ndarray, start: int, size: int) -> list[Span]:
    """Spans of the documents, or parts of them, in the ``size`` tokens from ``start`` on.

    Args:
        bounds: first token of each document, ascending; documents outside these tokens are skipped. int64 [documents]
        start: the first of the tokens.
        size: number of tokens, at least one.
    """
    first, last = np.searchsorted(bounds, start, "right"), np.searchsorted(bounds, start + size, "left")
    return [(begin, end - begin) for begin, end in pairwise([start, *bounds[first:last].tolist(), start + size])]


def leads_of(start: Sequence[int], bounds: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Number of ``start`` tokens to insert before each piece: those that precede the piece in its document.

    Args:
        start: ids before a text.
        bounds: first token of each document, ascending. int64 [documents + 1]
        pieces: first token of each piece. int64 [pieces]

    Returns:
        int64 [pieces]; 0 at the beginning of a document, which already contains them.
    """
    if not start:
        return np.zeros(len(pieces), np.int64)
    return np.minimum(_within(bounds, pieces), len(start))


def belongs_to_start(start: Sequence[int], bounds: np.ndarray, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which tokens of a file were put before a document by the tokenizer. bool [places]

    Args:
        start: ids before a text.
        bounds: see :func:`leads_of`.
        ids: ids of the whole file. [tokens]
        places: indices of the tokens to check. int64 [places]
    """
    if not start:
        return np.zeros(len(places), bool)
    within = _within(bounds, places)
    expected = np.asarray(start)[np.minimum(within, len(start) - 1)]
    return np.asarray((within < len(start)) & (ids[places] == expected))


def _within(bounds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Offset of each token within its document. int64 [places]"""
    return np.asarray(places - bounds[np.searchsorted(bounds, places, "right") - 1])
