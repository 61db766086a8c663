"""A model's loss on each row of a text, on disk beside the tokens: NaN where it has not been computed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from distill.core.artifact import hash_of
from distill.core.errors import MachineError
from distill.data.packed_rows import PackedRows
from distill.data.words import mixed

VERSION = 2
"""Format version; losses of another version are recomputed."""
_ROW = np.dtype([("loss", "<f4"), ("check", "<u4")])
"""A row's loss (NaN if unknown) and a 32-bit checksum of the row's number and loss (0 if unknown)."""


class RowLossFile:
    """The file of losses of one model on the rows of one text. Each is written once; an interrupted computation
    continues with the remaining rows.

    Args:
        packed: the rows.
        model: hash of the model's weights.

    Raises:
        MachineError: the folder of the tokens cannot be written.
    """

    def __init__(self, packed: PackedRows, model: str):
        tokens = Path(packed.tokens.path)
        key = hash_of(VERSION, tokens.name, packed.sequence_length, packed.packing, len(packed), model)
        self.path = tokens.with_name(f"row-losses-{key}.bin")
        size = len(packed) * _ROW.itemsize
        try:
            if not self.path.is_file() or self.path.stat().st_size != size:
                temporary = self.path.with_name(f".{self.path.name}.writing")
                np.full(len(packed), np.array((np.nan, 0), _ROW)).tofile(temporary)
                temporary.replace(self.path)
            self._rows = np.memmap(self.path, _ROW, "r+", shape=(len(packed),))  # [rows]
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._drop_damaged()

    def _drop_damaged(self) -> None:
        """Forget losses that do not match their checksums."""
        unknown = np.isnan(self._rows["loss"]) & (self._rows["check"] == 0)  # [rows]
        numbers = np.arange(len(self._rows))
        damaged = ~unknown & (self._rows["check"] != _check(numbers, self._rows["loss"]))  # [rows]
        if damaged.any():
            count = f"{damaged.sum():,} of {len(damaged):,} losses are"
            print(f"{self.path.name}: {count} not what was written; they are computed again", file=sys.stderr)
            self._rows[damaged] = (np.nan, 0)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """The rows among those given whose losses are unknown, in their order. int64 [rows]"""
        return rows[np.isnan(self._rows["loss"][rows])]

    def write(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """Store the losses of some rows. fp32 [rows]"""
        found = np.empty(len(rows), _ROW)
        found["loss"], found["check"] = losses, _check(rows, losses)
        self._rows[rows] = found

    def read(self) -> np.ndarray:
        """Losses of all rows, in nats per token that counts; NaN if unknown. fp32 [rows]"""
        self._rows.flush()
        return np.array(self._rows["loss"])


def _check(rows: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Checksums stored with the losses of some rows. uint32 [rows]

    Args:
        rows: numbers of the rows. int64 [rows]
        losses: fp32 [rows]
    """
    bits = np.ascontiguousarray(losses, np.float32).view(np.uint32).astype(np.uint64)
    numbers = (rows.astype(np.uint64) + np.uint64(1)) << np.uint64(32)
    return (mixed(numbers | bits) >> np.uint64(32)).astype(np.uint32)
