"""One rank's part of batches that all ranks read in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from distill.core.world import World


class Share:
    """Every ``world.size``-th batch, from the one at ``world.rank`` on; each rank gets as many.

    Where the last round has too few, a rank gets one that counts for nothing: all ranks must run as many forward
    passes, as they may exchange weights in them.

    Args:
        batches: dicts with a ``mask``; read from the start at each iteration.
        world: which rank this is.
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
