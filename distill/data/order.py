"""The order of samples: one endless list that the seed alone decides, pass after pass over all rows.

Each pass is shuffled anew. (Rows that are filled up to the longest of their batch are sorted into buckets of like
length first, stretch by stretch of the shuffled list, and the buckets shuffled.) A position in the list is one number,
and starting there is exact. :mod:`distill.data.mixture_order` is the same for several sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

from distill.data.micro_batches import MicroBatches

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 32
"""Rows of like length that follow each other when rows are filled up."""
BUCKETS = 32
"""Buckets that one stretch of the shuffled list is sorted into."""


class EndlessOrder(Sampler[list[int]]):
    """Lists of row numbers, one per micro-batch of a rank, endlessly.

    Args:
        taken: the positions of the endless list that the rank takes.
    """

    def __init__(self, taken: MicroBatches):
        self.taken = taken

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.taken:
            yield [self.row_at(position) for position in positions]

    def row_at(self, position: int) -> int:
        """The row that stands at a position of the endless list."""
        raise NotImplementedError


class GlobalOrder(EndlessOrder):
    """Pass after pass over all rows, each shuffled anew.

    Args:
        num_rows: rows in a pass.
        seed: decides the order.
        taken: the positions that the rank takes.
        lengths: tokens of each row, when rows of like length shall follow each other. int64 [num_rows]
    """

    def __init__(self, num_rows: int, seed: int, taken: MicroBatches, lengths: np.ndarray | None = None):
        if num_rows < 1:
            raise ValueError(f"{num_rows=}, expected at least 1")
        super().__init__(taken)
        self.num_rows = num_rows
        self.seed = seed
        self.lengths = lengths
        self._pass: tuple[int, Tensor] | None = None

    def row_at(self, position: int) -> int:
        """See :class:`EndlessOrder`."""
        number, within = divmod(position, self.num_rows)
        if self._pass is None or self._pass[0] != number:
            order = shuffled(self.num_rows, self.seed, f"pass {number}")  # [num_rows]
            if self.lengths is not None:
                order = bucketed(order, self.lengths, self.seed, f"buckets {number}")
            self._pass = (number, order)
        return int(self._pass[1][within])


def shuffled(count: int, seed: int, purpose: str) -> Tensor:
    """The numbers below ``count`` in an order that the seed and the purpose decide; global random state is not used."""
    return torch.randperm(count, generator=seeded(seed, purpose))


def seeded(seed: int, purpose: str) -> torch.Generator:
    """Random numbers on the CPU that the seed and the purpose decide, and nothing that was drawn before."""
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big"))
    return generator


def bucketed(order: Tensor, lengths: np.ndarray, seed: int, purpose: str) -> Tensor:
    """``order`` with numbers of like length beside each other.

    Each stretch of :data:`BUCKET` x :data:`BUCKETS` numbers is sorted by length, and its buckets are shuffled.
    """
    stretch, done = BUCKET * BUCKETS, []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]  # [stretch]
        part = part[torch.from_numpy(np.argsort(lengths[part.numpy()], kind="stable"))]
        buckets = part.split(BUCKET)
        done += [buckets[i] for i in shuffled(len(buckets), seed, f"{purpose} {start}").tolist()]
    return torch.cat(done)
