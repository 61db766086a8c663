"""Opens a teacher cache, finds its missing rows, and reads it as the rows of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile
from distill.data.spec import Packing
from distill.data.teacher_cache import CODECS
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.identity import HEADER, Identity, check_version, read_header
from distill.data.teacher_cache.positions import Positions, kept_of, predicted
from distill.data.teacher_cache.shards import Shard, open_shards


@dataclass(frozen=True)
class CacheLocation:
    """Location and identity of a cache, which need not exist yet.

    Attributes:
        folder: folder of this cache alone.
        identity: what the cache depends on.
        codec: its codec.
        width: number of rows of the teacher's head, or its hidden size, whichever the codec encodes.
        vocabulary: number of rows of the teacher's head.
    """

    folder: Path
    identity: Identity
    codec: CodecSpec
    width: int
    vocabulary: int

    @classmethod
    def there(cls, folder: Path) -> CacheLocation:
        """The cache in a folder, whatever its identity.

        Raises:
            InputError: there is no cache, or one of another version of distill.
        """
        header = read_header(folder)
        if header is None:
            raise InputError(f"{folder}: no teacher cache there (no {HEADER} in it)")
        check_version(folder, header)
        identity = Identity(**header["identity"])
        codec = CODECS[identity.codec["kind"]].model_validate(identity.codec)
        return cls(folder, identity, cast("CodecSpec", codec), header["width"], header["vocabulary"])

    def header(self) -> dict[str, Any] | None:
        """Its header; None if there is no cache.

        Raises:
            InputError: the cache belongs to another teacher, tokenizer, text or codec.
        """
        header = read_header(self.folder)
        if header is not None:
            self.identity.check(self.folder, header)
        return header

    def rows(self, tokens: TokenFile) -> PackedRows:
        """The rows in which the teacher reads a text."""
        return PackedRows(tokens, self.identity.window, packing=cast("Packing", self.identity.packing))

    def needed(self, packed: PackedRows, numbers: Iterable[int]) -> list[int]:
        """Ascending numbers of the teacher's rows that contain the predictions of the rows ``numbers`` of ``packed``.

        Raises:
            InputError: the teacher's packing leaves out some of these predictions.
        """
        places, wanted = Positions(self.rows(packed.tokens)), [predicted(packed, number) for number in numbers]
        rows, _ = places.find(np.concatenate(wanted))
        if (rows < 0).any():
            raise InputError(
                f"{self.folder}: read with packing {self.identity.packing}, which leaves out what is a single token in "
                f"its row, and this run's packing {packed.packing} learns from it; set data.packing to the same, or "
                "another folder"
            )
        return [int(row) for row in np.unique(rows)]

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Those of the teacher's rows ``wanted`` that are not cached, in ascending order.

        Raises:
            InputError: the cache belongs to another teacher, tokenizer, text or codec.
        """
        there: set[int] = set()
        if self.header() is not None:
            there = {int(number) for shard in open_shards(self.folder) for number in shard.rows}
        return sorted(set(wanted) - there)


class CachedRows(PackedRows):
    """Rows of a text whose batches also contain the teacher's output.

    Args:
        packed: the student's rows, which may be cut differently from the teacher's.
        place: location of the cache of their text.

    Raises:
        InputError: there is no cache, or it belongs to another teacher, tokenizer or text.
    """

    def __init__(self, packed: PackedRows, place: CacheLocation):
        super().__init__(packed.tokens, packed.sequence_length, packed.chosen, packing=packed.packing)
        if place.header() is None:
            raise InputError(f"{place.folder}: no teacher cache there; run its cache_teacher stage first")
        self.place = place
        self.read = place.rows(packed.tokens)
        self._positions = Positions(self.read)
        self._shards: list[Shard] | None = None
        self._where: dict[int, tuple[int, int]] = {}

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Tensor]:
        """As in :class:`PackedRows`, and the codec's keys: [batch, sequence] or [batch, sequence, any], 0 where no
        prediction counts.

        If a row is not cached, the keys are missing and no error is raised, because loaders read past the end of
        training. Training on such a batch raises an error.
        """
        batch = super().__getitem__(numbers)
        numbers = [numbers] if isinstance(numbers, int) else numbers
        found = [self._positions.find(predicted(self, number)) for number in numbers]
        # if nothing is predicted, any row has the keys and their shapes
        rows = np.unique(np.concatenate([row for row, _ in found])).tolist() or [self._any_row()]
        if not all(self._find(row) for row in rows):
            return batch
        decoded = {row: self._decoded(row) for row in rows}
        return batch | {
            key: _placed([_picked(decoded, key, *where) for where in found], batch["mask"]) for key in decoded[rows[0]]
        }

    def _decoded(self, row: int) -> dict[str, Tensor]:
        shard, index = self._find(row) or (None, 0)
        assert shard is not None
        ids, cached = ids_of(self.read, row), kept_of(self.read, row)
        num_positions = len(ids) if cached is None else int(cached.sum())
        return shard.decoded(index, ids, num_positions, self.place.codec, self.place.width)

    def _any_row(self) -> int:
        self._open()
        return next(iter(self._where), -1)

    def _find(self, row: int) -> tuple[Shard, int] | None:
        shards = self._open()
        if row not in self._where:
            return None
        index, number = self._where[row]
        return shards[index], number

    def _open(self) -> list[Shard]:
        if self._shards is None:
            self._shards = open_shards(self.place.folder)
            self._where = {
                int(there): (index, number)
                for index, shard in enumerate(self._shards)
                for number, there in enumerate(shard.rows)
            }
        return self._shards

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shards": None, "_where": {}}  # each worker maps the files itself


def _picked(decoded: dict[int, dict[str, Tensor]], key: str, rows: np.ndarray, within: np.ndarray) -> Tensor:
    """Gather the values of one student row from the teacher rows that contain it. [positions] or [positions, any]"""
    parts = [decoded[row][key] for row in np.unique(rows).tolist() or list(decoded)[:1]]
    if len(parts) == 1:
        return parts[0][torch.from_numpy(within)]
    most = [max(part.shape[1] for part in parts)] if parts[0].ndim == 2 else []
    out = torch.zeros(len(rows), *most, dtype=parts[0].dtype)
    for row, part in zip(np.unique(rows), parts, strict=True):
        on = torch.from_numpy(rows == row)
        out[(on, slice(part.shape[1])) if most else on] = part[torch.from_numpy(within[rows == row])]
    return out


def _placed(rows: list[Tensor], mask: Tensor) -> Tensor:
    """Scatter the values of each row to the True positions of ``mask`` [batch, sequence]; 0 elsewhere."""
    most = [max(row.shape[1] for row in rows)] if rows[0].ndim == 2 else []
    out = torch.zeros(*mask.shape, *most, dtype=rows[0].dtype)
    for slot, row, on in zip(out, rows, mask, strict=True):
        if most:
            slot[on, : row.shape[1]] = row
        else:
            slot[on] = row
    return out


def ids_of(read: PackedRows, row: int) -> np.ndarray:
    """The token ids of a row that are in the file (without inserted start tokens), in order. int64 [positions]"""
    return PackedRows.__getitem__(read, row)["input_ids"][0].numpy()[read.columns(row)]
