"""A shard: some rows of a cache in one safetensors file, written whole or not at all, read by memory mapping.

    rows [n]         numbers of the rows
    sizes [n]        their numbers of tokens
    offsets [n + 1]  where each row begins in ``payload``
    checks [n, 2]    CRC-32 of the row's token ids; CRC-32 of that value, the row's other fields and its bytes

With the checksums, a row is never used for other text, and damaged rows are never trained on.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.core import stop
from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError
from distill.data.teacher_cache.base import CodecSpec, decoded

_ARRAYS = ("rows", "sizes", "offsets", "checks")


@dataclass(frozen=True)
class Coded:
    """One encoded row of the teacher.

    Attributes:
        number: number of the row.
        size: number of tokens in it.
        ids: CRC-32 of its token ids.
        data: uint8, its encoded bytes.
    """

    number: int
    size: int
    ids: int
    data: Tensor


def checksum(values: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def shard_file(folder: Path, number: int) -> Path:
    """Name of the shard with this number."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(file: Path, coded: list[Coded]) -> None:
    """Write rows to ``file``, completely or not at all.

    Raises:
        MachineError: the disk is full or not writable.
    """
    tensors = {
        "rows": torch.tensor([row.number for row in coded]),
        "sizes": torch.tensor([row.size for row in coded]),
        "offsets": torch.tensor([0, *(len(row.data) for row in coded)]).cumsum(0),
        "checks": torch.tensor([[row.ids, _check(row.number, row.size, row.ids, row.data.numpy())] for row in coded]),
        "payload": torch.cat([row.data for row in coded]),
    }
    temporary = file.with_name(f".{file.name}.writing")
    try:
        save_file(tensors, temporary)
        sync(temporary)
        stop.confirm()
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "(os error " in str(error):  # safetensors' own error is no OSError
            raise MachineError(f"{file}: cannot be written ({error}); the shards before it are kept") from error
        raise


class Shard:
    """A finished shard, memory-mapped.

    Raises:
        ValueError: the file is incomplete or damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        if not file.is_file():
            raise ValueError(f"{file}: no regular file")
        with file.open("rb") as stream:
            size, length = file.stat().st_size, int.from_bytes(stream.read(8), "little")
            if 8 + length > size:
                raise ValueError(f"{file}: cut off")
            try:
                layout = json.loads(stream.read(length))
                places = {name: tuple(layout[name]["data_offsets"]) for name in (*_ARRAYS, "payload")}
                end = max(end for _, end in places.values())
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{file}: damaged") from None
        if 8 + length + end != size:
            raise ValueError(f"{file}: cut off")
        self._bytes = np.memmap(file, np.uint8, "r", offset=8 + length)

        def array(name: str) -> np.ndarray:
            start, end = places[name]
            return np.frombuffer(self._bytes[start:end].tobytes(), np.int64)

        try:
            self.rows, self.sizes, self.offsets = array("rows"), array("sizes"), array("offsets")
            self.checks = array("checks").reshape(len(self.rows), 2)
        except (ValueError, TypeError):
            raise ValueError(f"{file}: damaged") from None
        self._start, end = places["payload"]
        counts = {len(self.rows), len(self.sizes), len(self.offsets) - 1}
        if len(counts) > 1 or (np.diff(self.offsets, prepend=0) < 0).any() or self.offsets[-1] != end - self._start:
            raise ValueError(f"{file}: damaged")

    def read(self, index: int, ids: np.ndarray) -> Tensor:
        """The bytes of the row at an index of ``rows``; uint8. ``ids``: int64, the token ids it should belong to.

        Raises:
            MachineError: it belongs to other ids, or its bytes have changed.
        """
        data = self._data(index)
        if checksum(ids) != self.checks[index, 0]:
            raise self._refusal(index, "belongs to other text")
        if not self._whole(index, data):
            raise self._refusal(index, "is damaged")
        return torch.from_numpy(data)

    def damaged(self) -> list[int]:
        """Numbers of the rows whose bytes have changed."""
        return [int(row) for index, row in enumerate(self.rows) if not self._whole(index, self._data(index))]

    def decoded(
        self, index: int, ids: np.ndarray, num_positions: int, codec: CodecSpec, width: int
    ) -> dict[str, Tensor]:
        """The teacher's output at the cached positions of the row at an index of ``rows``.

        Args:
            index: index of the row.
            ids: int64, the token ids that it should belong to.
            num_positions: number of its cached positions.
            codec: codec of the cache.
            width: width of what the codec encodes.

        Raises:
            MachineError: as :meth:`read`.
            InputError: the checksums are correct, but the decoded values are invalid.
        """
        try:
            return decoded(codec, self.read(index, ids), num_positions, width)
        except ValueError as error:
            raise InputError(
                f"{self.file}: row {self.rows[index]} is not what {codec.kind} writes ({error}); remove this file and "
                "run again"
            ) from None

    def nonsense(self, codec: CodecSpec, width: int, window: int) -> list[int]:
        """Numbers of the rows whose checksums are correct, but whose decoded values are invalid.

        Args:
            codec: codec of the cache.
            width: width of what the codec encodes.
            window: maximum number of tokens in a row.
        """
        found = []
        for index, row in enumerate(self.rows):
            size, data = int(self.sizes[index]), self._data(index)
            try:
                if not 0 <= size <= window:
                    raise ValueError(f"{size} positions")
                if size:
                    decoded(codec, torch.from_numpy(data), size, width)
            except ValueError:
                found.append(int(row))
        return found

    def num_bytes(self) -> int:
        """Number of bytes of all rows."""
        return int(self.offsets[-1])

    def _data(self, index: int) -> np.ndarray:
        return self._bytes[self._start + self.offsets[index] : self._start + self.offsets[index + 1]].copy()

    def _whole(self, index: int, data: np.ndarray) -> bool:
        ids, expected = self.checks[index].tolist()
        return _check(int(self.rows[index]), int(self.sizes[index]), ids, data) == expected

    def _refusal(self, index: int, what: str) -> MachineError:
        return MachineError(f"{self.file}: row {self.rows[index]} {what}; remove this file and run again")


def _check(number: int, size: int, ids: int, data: np.ndarray) -> int:
    """CRC-32 of all fields of a row."""
    return zlib.crc32(data.tobytes(), checksum(np.array([number, size, ids])))


def shard_files(folder: Path) -> list[Path]:
    """Files of the shards in a folder, complete or not."""
    return sorted(folder.glob("shard-*.safetensors"))


def open_shards(folder: Path) -> list[Shard]:
    """The complete shards of a folder; incomplete and damaged ones are ignored."""
    found = []
    for file in shard_files(folder):
        try:
            found.append(Shard(file))
        except ValueError:
            continue
    return found
