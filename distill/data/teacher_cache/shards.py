"""A shard: some rows of a cache in one safetensors file, written whole or not at all, read by memory mapping.

``rows`` [n] are their numbers, ``offsets`` [n + 1] where each begins in ``payload``, ``checks`` [n, 2] the CRC-32 of
each row's token ids and of its bytes: a row is never handed to other text, and a damaged one never trained on.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distill.core.artifact import sync
from distill.core.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Coded:
    """One row of the teacher.

    Attributes:
        number: of the row.
        ids: CRC-32 of its token ids.
        data: uint8, what the codec made of it.
    """

    number: int
    ids: int
    data: Tensor


def checksum(values: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def shard_file(folder: Path, number: int) -> Path:
    """Name of the shard with this number."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(file: Path, coded: list[Coded]) -> None:
    """Write rows to ``file``; a kill leaves none of it.

    Raises:
        MachineError: the disk is full or not writable.
    """
    from safetensors.torch import save_file

    sizes = torch.tensor([0, *(len(row.data) for row in coded)])
    tensors = {
        "rows": torch.tensor([row.number for row in coded]),
        "offsets": sizes.cumsum(0),
        "checks": torch.tensor([[row.ids, checksum(row.data.numpy())] for row in coded]),
        "payload": torch.cat([row.data for row in coded]),
    }
    temporary = file.with_name(f".{file.name}.writing")
    try:
        save_file(tensors, temporary)
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "(os error " in str(error):  # safetensors' own error is no OSError
            raise MachineError(f"{file}: cannot be written ({error}); the shards before it are kept") from error
        raise


class Shard:
    """A finished shard, memory-mapped.

    Raises:
        ValueError: the file is not whole.
    """

    def __init__(self, file: Path):
        self.file = file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                layout = json.loads(stream.read(length))
                ends = [entry["data_offsets"] for name, entry in layout.items() if name != "__metadata__"]
            except ValueError:
                raise ValueError(f"{file}: damaged") from None
        if 8 + length + max(end for _, end in ends) != file.stat().st_size:
            raise ValueError(f"{file}: cut off")
        self._bytes = np.memmap(file, np.uint8, "r", offset=8 + length)

        def array(name: str) -> np.ndarray:
            start, end = layout[name]["data_offsets"]
            return np.frombuffer(self._bytes[start:end].tobytes(), np.int64)

        self.rows, self.offsets, self.checks = array("rows"), array("offsets"), array("checks").reshape(-1, 2)
        self._start = layout["payload"]["data_offsets"][0]

    def read(self, index: int, ids: np.ndarray) -> Tensor:
        """The bytes of the row at an index of ``rows``; uint8. ``ids``: int64, the token ids it should belong to.

        Raises:
            MachineError: it belongs to other ids, or its bytes have changed.
        """
        start, end = self._start + self.offsets[index], self._start + self.offsets[index + 1]
        data = self._bytes[start:end].copy()
        for what, found, expected in zip(
            ("belongs to other text", "is damaged"), (checksum(ids), checksum(data)), self.checks[index], strict=True
        ):
            if found != expected:
                raise MachineError(f"{self.file}: row {self.rows[index]} {what}; remove this file and run again")
        return torch.from_numpy(data)


def open_shards(folder: Path) -> list[Shard]:
    """The whole shards of a folder; those that are not whole count as not there."""
    found = []
    for file in sorted(folder.glob("shard-*.safetensors")):
        try:
            found.append(Shard(file))
        except ValueError:
            continue
    return found
