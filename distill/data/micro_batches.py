"""Which rows of the endless list of training rows a rank takes, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class MicroBatches:
    """The positions that one rank takes of a list that all ranks share.

    Attributes:
        size: number of rows in a micro-batch.
        consumed_sequences: number of rows that all ranks together have trained on: the position from which training
            continues.
        rank: rank of this process.
        world_size: number of processes that train together.
    """

    size: int
    consumed_sequences: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.size < 1 or self.consumed_sequences < 0:
            raise ValueError(f"no such part of the training rows: {self}")

    @property
    def step(self) -> int:
        """Number of rows that all ranks together take in a micro-step."""
        return self.size * self.world_size

    def __iter__(self) -> Iterator[range]:
        """Yield the positions of one micro-batch after the other, endlessly."""
        for start in count(self.consumed_sequences + self.rank * self.size, self.step):
            yield range(start, start + self.size)
