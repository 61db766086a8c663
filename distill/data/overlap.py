"""Finds training rows that contain rows of a test set, by common word 8-grams.

A word of a test row is found in a training row if an 8-gram that contains it is in both. The test row is found if more
than half of its words are. A test row of fewer than eight words is found only if it equals a whole training row, or a
message of a conversation.

Source: Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from distill.data.base import Conversation, Document, digest, normalised
from distill.data.words import runs_of, words_of

RUN = 8
SHARE = 0.5


class Hit(NamedTuple):
    """A test row that was found.

    Attributes:
        id: name of the test row in messages to the user.
        share: fraction of its words that were found.
    """

    id: str
    share: float


class TestRows:
    """Rows of test sets that are searched for in training rows.

    Args:
        rows: the rows of all test sets.
    """

    __test__ = False  # not a test class of pytest

    def __init__(self, rows: Iterable[Document | Conversation]):
        self._ids: list[str] = []
        self._short: dict[bytes, str] = {}
        sizes, runs = [], []
        for row in rows:
            words = words_of(row.text)
            if len(words) < RUN:
                self._short.setdefault(digest(normalised(row.text)), row.id)
                continue
            self._ids.append(row.id)
            sizes.append(len(words))
            runs.append(runs_of(words, RUN))
        self._sizes = np.array(sizes, np.int64)  # words, [rows]
        self._build(runs)

    def _build(self, runs: list[np.ndarray]) -> None:
        """Sort all 8-grams, each with its row and its position in the row."""
        every = np.concatenate(runs) if runs else np.zeros(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self._runs = every[order]
        self._rows = np.repeat(np.arange(len(runs)), [len(one) for one in runs])[order]
        self._places = np.concatenate([np.arange(len(one)) for one in runs] or [np.zeros(0, np.int64)])[order]

    def find(self, item: Document | Conversation, words: np.ndarray) -> Hit | None:
        """The test row with the largest fraction of its words in a training row; None if no row is found.

        Args:
            item: the training row.
            words: hashes of the words of its text. uint64 [words]
        """
        said = [message["content"] for message in item.messages] if isinstance(item, Conversation) else []
        for text in [item.text, *said] if self._short else ():
            if (id := self._short.get(digest(normalised(text)))) is not None:
                return Hit(id, 1.0)
        runs = np.unique(runs_of(words, RUN))
        first, last = np.searchsorted(self._runs, runs, "left"), np.searchsorted(self._runs, runs, "right")
        counts = last - first
        if not counts.any():
            return None
        # first[i], first[i] + 1, ... up to last[i] of every 8-gram
        found = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        rows, places = self._rows[found], self._places[found]
        best = None
        # skip test rows that share too few 8-grams to be found, whatever their positions are
        enough = np.bincount(rows, minlength=len(self._sizes)) * RUN > SHARE * self._sizes
        for row in np.flatnonzero(enough).tolist():
            begins = np.sort(places[rows == row])
            covered = RUN + int(np.minimum(np.diff(begins), RUN).sum())
            hit = Hit(self._ids[row], covered / int(self._sizes[row]))
            if hit.share > SHARE and (best is None or hit.share > best.share):
                best = hit
        return best
