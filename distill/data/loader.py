"""The order of samples, and data loaders that follow it.

The order of training blocks is one endless list that the seed alone decides: pass after pass over all blocks, each pass
shuffled anew. (Blocks that are filled up to the longest of their batch are sorted into buckets of like length first,
stretch by stretch of the shuffled list, and the buckets shuffled.) Micro-step ``m`` takes the next
``micro_batch_size * world_size`` of them and rank ``r`` its part, so the blocks of an optimizer step are the same
whatever the split into ranks, micro-batches and accumulation. A position in the list is one number, and starting there
is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from distill.data.blocks import Blocks
from distill.data.stream import Stream, StreamBatches

if TYPE_CHECKING:
    from torch import Tensor

    Batches = DataLoader[dict[str, Tensor]]

BUCKET = 32
"""Rows of like length that follow each other when rows are filled up."""
BUCKETS = 32
"""Buckets that one stretch of the shuffled list is sorted into."""


class GlobalOrder(Sampler[list[int]]):
    """Lists of ``micro_batch_size`` block numbers for one rank, for ever or up to a position.

    Args:
        num_blocks: blocks in a pass.
        seed: decides the order.
        micro_batch_size: blocks for a rank in a micro-step.
        consumed_sequences: blocks that all ranks together have taken already: where to start in the list.
        rank: this process.
        world_size: processes that share the list.
        end_sequences: stop when the list is taken up to here; None never stops. The last micro-batch is
            full all the same.
        lengths: tokens of each block, when blocks of like length shall follow each other. int64 [num_blocks]
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        micro_batch_size: int,
        consumed_sequences: int = 0,
        rank: int = 0,
        world_size: int = 1,
        end_sequences: int | None = None,
        lengths: np.ndarray | None = None,
    ):
        if not 0 <= rank < world_size or num_blocks < 1 or micro_batch_size < 1 or consumed_sequences < 0:
            raise ValueError(f"{rank=} {world_size=} {num_blocks=} {micro_batch_size=} {consumed_sequences=}")
        self.num_blocks = num_blocks
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.consumed_sequences = consumed_sequences
        self.rank = rank
        self.world_size = world_size
        self.end_sequences = end_sequences
        self.lengths = lengths
        self._pass: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_size * self.world_size
        position = self.consumed_sequences
        while self.end_sequences is None or position < self.end_sequences:
            first = position + self.rank * self.micro_batch_size
            yield [self.block_at(first + i) for i in range(self.micro_batch_size)]
            position += step

    def __len__(self) -> int:
        if self.end_sequences is None:
            raise TypeError("an endless order has no length")
        return max(0, -(-(self.end_sequences - self.consumed_sequences) // (self.micro_batch_size * self.world_size)))

    def block_at(self, position: int) -> int:
        """The block that stands at a position of the endless list."""
        number, within = divmod(position, self.num_blocks)
        if self._pass is None or self._pass[0] != number:
            order = shuffled(self.num_blocks, self.seed, f"pass {number}")
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
        part = order[start : start + stretch]
        part = part[torch.from_numpy(np.argsort(lengths[part.numpy()], kind="stable"))]
        buckets = part.split(BUCKET)
        done += [buckets[i] for i in shuffled(len(buckets), seed, f"{purpose} {start}").tolist()]
    return torch.cat(done)


def order_of(blocks: Blocks, seed: int, micro_batch_size: int, *where: Any) -> GlobalOrder:
    """The order in which blocks train; ``where`` are the other arguments of :class:`GlobalOrder`, up to the end."""
    order = GlobalOrder(len(blocks), seed, micro_batch_size, *where)
    if blocks.packing == "padded":
        order.lengths = blocks.lengths()
    return order


def in_turn(count: int, batch_size: int) -> list[list[int]]:
    """The numbers below ``count`` in lists of ``batch_size``; the last one may be shorter."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


def train_batches(
    blocks: Blocks,
    seed: int,
    micro_batch_size: int,
    consumed_sequences: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    end_sequences: int | None = None,
) -> Batches:
    """Micro-batches of training blocks, endless unless ``end_sequences`` is set. See :class:`GlobalOrder`."""
    order = order_of(blocks, seed, micro_batch_size, consumed_sequences, rank, world_size, end_sequences)
    return loader(blocks, order, num_workers)


def stream_batches(
    stream: Stream,
    micro_batch_size: int,
    consumed_sequences: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    end_sequences: int | None = None,
) -> Batches:
    """As :func:`train_batches` for a stream, in its own order; without a length."""
    batches = StreamBatches(stream, micro_batch_size, consumed_sequences, rank, world_size, end_sequences)
    return loader(batches, None, min(num_workers, 1))


def validation_batches(
    blocks: Blocks, batch_size: int, num_workers: int = 0, num_sequences: int | None = None
) -> Batches:
    """All blocks, or so many of them evenly spread, once, in a fixed order; the last batch may be smaller."""
    count = min(num_sequences or len(blocks), len(blocks))
    return loader(blocks, _alike(blocks, np.arange(count) * len(blocks) // max(count, 1), batch_size), num_workers)


def calibration_batches(blocks: Blocks | Stream, seed: int, num_sequences: int, batch_size: int) -> Batches:
    """``num_sequences`` training blocks, or all when there are fewer, that the seed alone chooses; finite.

    Of a stream they are the first ones.
    """
    if isinstance(blocks, Stream):
        first = blocks.first(num_sequences)
        return loader([blocks.batch(first[rows]) for rows in in_turn(len(first), batch_size)], None, 0)
    chosen = shuffled(len(blocks), seed, "calibration")[:num_sequences].numpy()
    return loader(blocks, _alike(blocks, chosen, batch_size), 0)


def _alike(blocks: Blocks, numbers: np.ndarray, batch_size: int) -> list[list[int]]:
    """Lists of ``batch_size`` of the numbers, in their order, or by length where rows are filled up."""
    if blocks.packing == "padded":
        numbers = numbers[np.argsort(blocks.lengths()[numbers], kind="stable")]
    return [numbers[rows].tolist() for rows in in_turn(len(numbers), batch_size)]


def loader(dataset: Any, order: Any, num_workers: int) -> Batches:
    """A loader whose dataset is asked for a whole batch at once, and which leaves the global random state alone."""
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else making an iterator would draw from the global generator
    )
