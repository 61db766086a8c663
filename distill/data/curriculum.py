"""An order of rows in which the first rows are sorted from easy to hard.

The usual order decides which rows are read in the sorted part of the training; they are only permuted. So a training
reads the same rows with and without a curriculum, and a cache of its teacher contains them. They are sorted into
:data:`LEVELS` levels with about the same number of rows. Within a level the order is unchanged, so a batch is not full
of copies of one row, or of rows of one length. In a mixture, each source keeps its positions, so its weight holds from
the start.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from distill.data.order import EndlessOrder
from distill.data.packed_rows import PackedRows

LEVELS = 32


class EasyFirst(EndlessOrder):
    """Another order whose first rows are sorted from easy to hard.

    Args:
        usual: the order without it.
        num_sorted: number of initial positions whose rows are sorted.
        hardness: difficulty of each row. [rows]
        source: number of the source of each row in a mixture; otherwise all 0. int64 [rows]
    """

    def __init__(self, usual: EndlessOrder, num_sorted: int, hardness: np.ndarray, source: np.ndarray):
        super().__init__(usual.taken)
        self.usual, self.num_sorted, self.hardness, self.source = usual, num_sorted, hardness, source

    def row_at(self, position: int) -> int:
        """See :class:`~distill.data.order.EndlessOrder`."""
        return int(self._sorted[position]) if position < self.num_sorted else self.usual.row_at(position)

    @cached_property
    def _sorted(self) -> np.ndarray:
        """The rows of the sorted positions. int64 [num_sorted]"""
        rows = np.array([self.usual.row_at(position) for position in range(self.num_sorted)], np.int64)
        for source in np.unique(self.source[rows]):
            places = np.flatnonzero(self.source[rows] == source)
            own = rows[places]
            rows[places] = own[np.argsort(levels(self.hardness[own]), kind="stable")]
        return rows


def levels(hardness: np.ndarray) -> np.ndarray:
    """Level of each row, from 0 on; rows of equal difficulty have the same level. int64 [rows]"""
    edges = np.sort(hardness)[np.arange(1, LEVELS) * len(hardness) // LEVELS]
    return np.searchsorted(edges, hardness, "right")


def longest_documents(packed: PackedRows) -> np.ndarray:
    """Number of tokens of the longest document, or part of one, in each row. int64 [rows]"""
    longest = np.maximum.reduceat(packed.rows.sizes, packed.rows.bounds[:-1])
    return np.asarray(longest[packed.chosen])
