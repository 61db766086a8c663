"""How a flat file of tokens is cut into rows: which pieces of it stand in which row.

    wrapped     documents end to end, cut every ``sequence_length`` tokens; a token sees the documents before its own
    documents   the same rows, but a token sees its own document alone
    best_fit    whole documents side by side, as many as fit; only one that is longer than a row is cut
    padded      one document a row (a longer one is cut), in batches of like length, filled up to the longest

Best fit, decreasing: the longest piece first, each into the fullest row that still takes it. It loses less of a
sentence than cutting and, unlike padding, next to no room. Source: Ding et al. 2024, arXiv 2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from distill.data.spec import FULL

if TYPE_CHECKING:
    from distill.data.packing import TokenFile
    from distill.data.spec import Packing

Span = tuple[int, int]
"""First token of a piece, and how many there are."""


@dataclass(frozen=True)
class Rows:
    """The pieces of every row. Row ``r`` holds the pieces ``bounds[r]`` up to ``bounds[r + 1]``.

    Attributes:
        starts: int64 [pieces], the first token of each in the file.
        sizes: int64 [pieces], at least two tokens.
        bounds: int64 [rows + 1].
    """

    starts: np.ndarray
    sizes: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def spans(self, row: int) -> list[Span]:
        """The pieces of a row, in order."""
        some = slice(self.bounds[row], self.bounds[row + 1])
        return list(zip(self.starts[some].tolist(), self.sizes[some].tolist(), strict=True))

    def lengths(self) -> np.ndarray:
        """Tokens in each row. int64 [rows]"""
        return np.add.reduceat(self.sizes, self.bounds[:-1]) if len(self) else self.sizes


def rows_of(tokens: TokenFile, sequence_length: int, packing: Packing) -> Rows:
    """Cut a file into rows of at most ``sequence_length`` tokens.

    A token alone in its piece is left out: there is nothing before it that could predict it.
    """
    if packing in FULL:
        starts = np.arange(0, tokens.num_tokens - 1, sequence_length)
        sizes = np.minimum(tokens.num_tokens - starts, sequence_length)
    else:
        starts, sizes = _cut(tokens, sequence_length)
    if packing != "best_fit":
        return Rows(starts, sizes, np.arange(len(starts) + 1))
    row_of = best_fit(sizes, sequence_length)
    order = np.argsort(row_of, kind="stable")
    return Rows(starts[order], sizes[order], np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2)))


def _cut(tokens: TokenFile, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of all documents, those that are longer than a row in pieces."""
    ends = np.flatnonzero(tokens.ids() == tokens.end) + 1
    firsts = np.concatenate([[0], ends[:-1]])
    pieces = -(-(ends - firsts) // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(firsts, pieces) + number * length
    sizes = np.minimum(np.repeat(ends, pieces) - starts, length)
    return starts[sizes > 1], sizes[sizes > 1]


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece; rows are numbered in the order of their first pieces.

    Args:
        sizes: tokens of each piece, at most ``length``. int64 [pieces]
        length: tokens that a row takes.
    """
    row_of = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms: list[int] = []  # for which there are rows, rising
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


def document_spans(ids: np.ndarray, end: int, start: int = 0) -> list[Span]:
    """The documents, or parts of them, in a stretch of the file that begins at token ``start``. ids: [tokens]"""
    bounds = [0, *(np.flatnonzero(ids[:-1] == end) + 1).tolist(), len(ids)]
    return [(start + first, last - first) for first, last in pairwise(bounds)]
