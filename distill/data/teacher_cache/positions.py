"""From positions in a token file to the rows in which the teacher read them.

A cache holds what the teacher said at each position of the file, in the rows that *it* read: its window, its packing.
A student's rows may be cut in any other way; what it gets at a position is what the teacher said there, having seen
what stood before it in the teacher's own row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill.data.blocks import Blocks


class Positions:
    """Finds positions of the file in the teacher's rows.

    Args:
        read: the rows that the teacher reads.
    """

    def __init__(self, read: Blocks):
        rows = read.rows
        order = np.argsort(rows.starts)
        before = np.cumsum(rows.sizes) - rows.sizes
        counts = np.diff(rows.bounds)
        self._starts = rows.starts[order]
        self._ends = self._starts + rows.sizes[order]
        self._rows = np.repeat(np.arange(len(rows)), counts)[order]
        self._offsets = (before - np.repeat(before[rows.bounds[:-1]], counts))[order]

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the teacher's row of each position, -1 where none has it, and the position within that row.

        Args:
            wanted: int64 [positions], in the file.

        Returns:
            Both int64 [positions].
        """
        piece = np.searchsorted(self._starts, wanted, "right") - 1
        there = (piece >= 0) & (wanted < self._ends[piece])
        return np.where(there, self._rows[piece], -1), self._offsets[piece] + wanted - self._starts[piece]


def predicted(blocks: Blocks, number: int) -> np.ndarray:
    """Positions in the file at which the predictions of a row count, in the row's order. int64 [positions]"""
    return np.concatenate([np.arange(start, start + size - 1) for start, size in blocks.pieces(number)])
