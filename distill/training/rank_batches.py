"""The batches of one rank. All ranks read the same batches in the same order, and each takes its part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from distill.core.world import World


class RankBatches:
    """Every ``world.size``-th batch, starting with the one at ``world.rank``. All ranks get the same number.

    If there are too few batches for the last round, the remaining ranks get a batch whose mask is False everywhere: all
    ranks must make the same number of forward passes, because sharded weights are gathered in them.

    Args:
        batches: dicts with a ``mask``; iterated from the start each time.
        world: all processes of the run, and the rank of this process.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], world: World):
        self.batches, self.world = batches, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.batches)
        while round_ := list(islice(batches, self.world.size)):
            if self.world.rank < len(round_):
                yield round_[self.world.rank]
            else:
                yield round_[0] | {"mask": torch.zeros_like(round_[0]["mask"])}
