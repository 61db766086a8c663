"""A teacher cache: open it, see which blocks it lacks, and train from it as from any blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill.core.errors import InputError
from distill.data.blocks import Blocks
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.identity import Identity, read_header
from distill.data.teacher_cache.shards import Shard, open_shards

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a cache is, or will be, and what it belongs to.

    Attributes:
        folder: of the cache alone.
        identity: what it belongs to.
        codec: how it is coded.
        width: rows of the teacher's head, or its hidden size, whichever the codec codes.
        vocabulary: rows of the teacher's head.
    """

    folder: Path
    identity: Identity
    codec: CodecSpec
    width: int
    vocabulary: int

    def header(self) -> dict[str, Any] | None:
        """Its header when there is a cache.

        Raises:
            InputError: there is one of another teacher, tokenizer, text or codec.
        """
        header = read_header(self.folder)
        if header is not None:
            self.identity.check(self.folder, header)
        return header

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Those of the blocks ``wanted`` that are not cached, in rising order.

        Raises:
            InputError: the cache is another's.
        """
        there: set[int] = set()
        if self.header() is not None:
            there = {int(number) for shard in open_shards(self.folder) for number in shard.blocks}
        return sorted(set(wanted) - there)


class CachedBlocks(Blocks):
    """Blocks whose batches also hold what the teacher said about them.

    Args:
        blocks: the text.
        place: the cache of it.

    Raises:
        InputError: there is no cache, or it is another's.
    """

    def __init__(self, blocks: Blocks, place: Place):
        super().__init__(blocks.tokens, blocks.sequence_length, blocks.chosen, packing=blocks.packing)
        if place.header() is None:
            raise InputError(f"{place.folder}: no teacher cache there; run its cache_teacher stage first")
        self.place = place
        self._shards: list[Shard] | None = None
        self._where: dict[int, tuple[int, int]] = {}

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Tensor]:
        """As in :class:`Blocks`, and the codec's keys: [batch, sequence] or [batch, sequence, any], 0 where no
        prediction counts.

        Without these keys when a block is not cached: loaders read ahead, over the end of training, and only who uses
        such a batch makes a mistake.
        """
        batch = super().__getitem__(numbers)
        numbers = [numbers] if isinstance(numbers, int) else numbers
        if not all(self._find(number) for number in numbers):
            return batch
        rows = [
            self._decoded(number, ids, int(mask.sum()))
            for number, ids, mask in zip(numbers, batch["input_ids"], batch["mask"], strict=True)
        ]
        return batch | {key: _placed([row[key] for row in rows], batch["mask"]) for key in rows[0]}

    def _decoded(self, number: int, ids: Tensor, num_positions: int) -> dict[str, Tensor]:
        shard, row = self._find(number) or (None, 0)
        assert shard is not None
        return self.place.codec.decode(shard.read(row, ids.numpy()), num_positions, self.place.width)

    def _find(self, number: int) -> tuple[Shard, int] | None:
        if self._shards is None:
            self._shards = open_shards(self.place.folder)
            self._where = {
                int(block): (index, row)
                for index, shard in enumerate(self._shards)
                for row, block in enumerate(shard.blocks)
            }
        if number not in self._where:
            return None
        index, row = self._where[number]
        return self._shards[index], row

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shards": None, "_where": {}}  # a worker maps the files itself


def _placed(rows: list[Tensor], mask: Tensor) -> Tensor:
    """[positions] or [positions, any] of each block to where ``mask`` [batch, sequence] has them; else 0."""
    most = [max(row.shape[1] for row in rows)] if rows[0].ndim == 2 else []
    out = torch.zeros(*mask.shape, *most, dtype=rows[0].dtype)
    for slot, row, on in zip(out, rows, mask, strict=True):
        if most:
            slot[on, : row.shape[1]] = row
        else:
            slot[on] = row
    return out


def ids_of(blocks: Blocks, number: int) -> np.ndarray:
    """The token ids of a block with its filling, int64 [sequence]."""
    return Blocks.__getitem__(blocks, number)["input_ids"][0].numpy()
