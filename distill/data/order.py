"""The order of rows: one endless list that the seed alone decides, pass after pass over all rows.

Each pass is shuffled anew. (If rows are padded, each section of the shuffled list is in addition sorted into buckets of
similar length, and the buckets are shuffled.) A position in the list is one number, and starting there is exact.
:mod:`distill.data.mixture_order` is the same for several sources.
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
"""Number of rows of similar length that follow each other if rows are padded."""
BUCKETS = 32
"""Number of buckets into which one section of the shuffled list is sorted."""


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
        """The row at a position of the endless list."""
        raise NotImplementedError


class GlobalOrder(EndlessOrder):
    """Pass after pass over all rows, each shuffled anew.

    Args:
        num_rows: number of rows in a pass.
        seed: decides the order.
        taken: the positions that the rank takes.
        lengths: number of tokens in each row, if rows of similar length are to follow each other; else None. int64
            [num_rows]
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
    """The numbers below ``count``, shuffled by ``seed`` and ``purpose``; independent of global random state."""
    return torch.randperm(count, generator=seeded(seed, purpose))


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded from ``seed`` and ``purpose``; independent of global random state."""
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big"))
    return generator


def bucketed(order: Tensor, lengths: np.ndarray, seed: int, purpose: str) -> Tensor:
    """``order``, in which numbers of rows of similar length follow each other.

    Each section of :data:`BUCKET` x :data:`BUCKETS` numbers is sorted by length, and its buckets are shuffled.
    """
    stretch, done = BUCKET * BUCKETS, []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]  # [stretch]
        part = part[torch.from_numpy(np.argsort(lengths[part.numpy()], kind="stable"))]
        buckets = part.split(BUCKET)
        done += [buckets[i] for i in shuffled(len(buckets), seed, f"{purpose} {start}").tolist()]
    return torch.cat(done)
