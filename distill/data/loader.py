"""Data loaders, and the order of rows that they follow.

The order of training rows is one endless list that the seed alone decides; see :mod:`distill.data.order`. Each
micro-step takes the next ``micro_batch_size * world_size`` rows of it, and each rank its part of these. So the rows of
an optimizer step do not depend on the split into ranks, micro-batches and accumulation. A position in the list is one
number, and starting there is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from distill.core import stop
from distill.data.curriculum import EasyFirst
from distill.data.micro_batches import MicroBatches
from distill.data.mixture_order import MixtureOrder, SourceRows
from distill.data.order import EndlessOrder, GlobalOrder, shuffled
from distill.data.packed_rows import PackedRows
from distill.data.stream import Stream
from distill.data.stream_reader import StreamBatches

if TYPE_CHECKING:
    from torch import Tensor

    Batches = DataLoader[dict[str, Tensor]]


def order_of(packed: PackedRows, seed: int, taken: MicroBatches) -> EndlessOrder:
    """The training order without ``data.order``."""
    if packed.tokens.parts:
        return MixtureOrder(rows_of_sources(packed), seed, taken, alike=packed.packing == "padded")
    return GlobalOrder(len(packed), seed, taken, packed.lengths() if packed.packing == "padded" else None)


def rows_of_sources(packed: PackedRows) -> list[SourceRows]:
    """The rows of each source of a mixture, with its weight."""
    lengths, source = packed.lengths(), packed.source_of_rows()
    found = (np.flatnonzero(source == number) for number in range(len(packed.tokens.parts)))
    return [
        SourceRows(part.weight, numbers, lengths[numbers])
        for part, numbers in zip(packed.tokens.parts, found, strict=True)
    ]


def rows_to_calibrate(packed: PackedRows, seed: int, num_sequences: int) -> np.ndarray:
    """The first ``num_sequences`` rows of a mixture in a shuffled order with a separate seed, without repetitions.
    int64 [rows]"""
    order = MixtureOrder(rows_of_sources(packed), seed, MicroBatches(1), purpose="calibration ")
    return np.array(list(dict.fromkeys(order.row_at(position) for position in range(num_sequences))))


def in_turn(count: int, batch_size: int) -> list[list[int]]:
    """The numbers below ``count`` in lists of ``batch_size``; the last one may be shorter."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


def in_lists(numbers: np.ndarray, batch_size: int) -> list[list[int]]:
    """Row numbers in lists of ``batch_size``, in their order; the last one may be shorter. numbers: int64 [rows]"""
    return [numbers[rows].tolist() for rows in in_turn(len(numbers), batch_size)]


def train_batches(
    packed: PackedRows,
    seed: int,
    taken: MicroBatches,
    num_workers: int = 0,
    num_sorted: int = 0,
    hardness: np.ndarray | None = None,
) -> Batches:
    """Loader of micro-batches of training rows, endless; the first ``num_sorted`` rows are ordered by difficulty.

    Args:
        packed: the training rows.
        seed: decides the order.
        taken: the positions that this process takes.
        num_workers: number of processes that read ahead.
        num_sorted: number of initial rows that are sorted.
        hardness: difficulty of each row; required if ``num_sorted`` is not 0. [rows]
    """
    order = order_of(packed, seed, taken)
    if num_sorted:
        assert hardness is not None
        return loader(packed, EasyFirst(order, num_sorted, hardness, packed.source_of_rows()), num_workers)
    return loader(packed, order, num_workers)


def stream_batches(stream: Stream, taken: MicroBatches) -> Batches:
    """As :func:`train_batches` for a stream, in the stream's order; a separate process reads ahead anyway."""
    return loader(StreamBatches(stream, taken), None, 0)


def validation_batches(packed: PackedRows, batch_size: int, num_sequences: int | None = None) -> Batches:
    """Loader of all rows, or of ``num_sequences`` of them evenly spread; once, in a fixed order; the last batch may be
    smaller."""
    return loader(packed, in_lists(alike(packed, evenly(len(packed), num_sequences)), batch_size), 0)


def calibration_batches(packed: PackedRows | Stream, seed: int, num_sequences: int, batch_size: int) -> Batches:
    """Loader of ``num_sequences`` training rows, or of all if there are fewer, chosen by the seed alone; finite.

    For a stream, they are the first rows.
    """
    if isinstance(packed, Stream):
        first = packed.first(num_sequences)
        return loader([packed.batch(first[rows]) for rows in in_turn(len(first), batch_size)], None, 0)
    if packed.tokens.parts:
        chosen = rows_to_calibrate(packed, seed, num_sequences)
    else:
        chosen = shuffled(len(packed), seed, "calibration")[:num_sequences].numpy()
    return loader(packed, in_lists(alike(packed, chosen), batch_size), 0)


def evenly(count: int, wanted: int | None = None) -> np.ndarray:
    """``wanted`` of the numbers below ``count``, evenly spread, or all of them. int64 [numbers]"""
    wanted = min(wanted or count, count)
    return np.arange(wanted) * count // max(wanted, 1)


def alike(rows: Any, numbers: np.ndarray) -> np.ndarray:
    """Numbers of rows in their order, or sorted by length if rows are padded. int64 [rows]"""
    return numbers[np.argsort(rows.lengths()[numbers], kind="stable")] if rows.packing == "padded" else numbers


def loader(dataset: Any, order: Any, num_workers: int) -> Batches:
    """A loader that requests whole batches from its dataset, and does not use the global random state."""
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=stop.in_worker,
        generator=torch.Generator(),  # else making an iterator would draw from the global generator
    )
