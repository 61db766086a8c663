"""A model's loss on each row of a text, on disk beside the tokens: NaN where it has not been computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.core.artifact import hash_of
from distill.core.errors import MachineError
from distill.data.packed_rows import PackedRows

VERSION = 1
"""Of what is written; losses of another version are computed anew."""


class RowLosses:
    """The file of losses of one model on the rows of one text. Each is written once; an interrupted computation
    continues with the remaining rows.

    Args:
        packed: the rows.
        model: stands for the model's weights.

    Raises:
        MachineError: the folder of the tokens cannot be written.
    """

    def __init__(self, packed: PackedRows, model: str):
        tokens = Path(packed.tokens.path)
        key = hash_of(VERSION, tokens.name, packed.sequence_length, packed.packing, len(packed), model)
        self.path = tokens.with_name(f"row-losses-{key}.bin")
        try:
            if not self.path.is_file() or self.path.stat().st_size != 4 * len(packed):
                temporary = self.path.with_name(f".{self.path.name}.writing")
                np.full(len(packed), np.nan, np.float32).tofile(temporary)
                temporary.replace(self.path)
            self._losses = np.memmap(self.path, np.float32, "r+", shape=(len(packed),))  # [rows]
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows whose losses are not known, in their order. int64 [rows]"""
        return rows[np.isnan(self._losses[rows])]

    def write(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """Keep the losses of some rows. fp32 [rows]"""
        self._losses[rows] = losses

    def read(self) -> np.ndarray:
        """Of all rows, in nats per token that counts; NaN where not known. fp32 [rows]"""
        self._losses.flush()
        return np.array(self._losses)
