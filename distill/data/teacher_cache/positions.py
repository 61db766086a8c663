"""Maps positions in a token file to the rows in which the teacher read them.

A cache stores the teacher's output per position of the token file, computed in the teacher's own rows (its window and
packing). If only some tokens are learned from, it stores only the positions that predict one. The student may use
another packing. At each position it gets the stored output, for which the teacher has read the text before the position
in its own row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill.data.packed_rows import PackedRows


class Positions:
    """Finds positions of the file in the teacher's rows.

    Args:
        read: the rows that the teacher reads.
    """

    def __init__(self, read: PackedRows):
        rows, self._read = read.rows, read
        order = np.argsort(rows.starts)
        sizes = rows.sizes
        if (learned := read.learned()) is not None:
            stretches = zip(rows.starts.tolist(), rows.sizes.tolist(), strict=True)
            sizes = np.array([np.count_nonzero(_kept(learned, *stretch)) for stretch in stretches], np.int64)
        before = np.cumsum(sizes) - sizes  # cached positions before each piece
        counts = np.diff(rows.bounds)
        self._starts = rows.starts[order]
        self._ends = self._starts + rows.sizes[order]
        self._rows = np.repeat(np.arange(len(rows)), counts)[order]
        self._offsets = (before - np.repeat(before[rows.bounds[:-1]], counts))[order]

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's row of each position (-1 if there is none), and its index among the cached positions of that
        row.

        Args:
            wanted: int64 [positions], in the file; each predicts a token that is learned from.

        Returns:
            Both int64 [positions].
        """
        piece = np.searchsorted(self._starts, wanted, "right") - 1
        there = (piece >= 0) & (wanted < self._ends[piece])
        within = wanted - self._starts[piece]
        if (learned := self._read.learned()) is not None:
            found = np.flatnonzero(there)
            found = found[np.argsort(piece[found], kind="stable")]
            for some in np.split(found, np.flatnonzero(np.diff(piece[found])) + 1):  # those of one piece each
                if len(some):
                    start, end = int(self._starts[piece[some[0]]]), int(self._ends[piece[some[0]]])
                    within[some] = (np.cumsum(_kept(learned, start, end - start)) - 1)[within[some]]
        return np.where(there, self._rows[piece], -1), self._offsets[piece] + within


def kept_of(read: PackedRows, row: int) -> np.ndarray | None:
    """Which positions of one of the teacher's rows are cached; None: all. bool [positions]"""
    learned = read.learned()
    if learned is None:
        return None
    return np.concatenate([_kept(learned, start, size) for start, size in read.rows.spans(row)])


def _kept(learned: np.ndarray, start: int, size: int) -> np.ndarray:
    """Which positions in a section of the file predict a token that is learned from. bool [size]"""
    following = learned[start + 1 : start + size + 1]
    return np.pad(following, (0, size - len(following)))  # nothing follows the file's last token


def predicted(packed: PackedRows, number: int) -> np.ndarray:
    """Positions in the file at which the predictions of a row count, in the row's order. int64 [positions]"""
    return packed.predicted(number) - 1  # the teacher's prediction is stored at the token before
