"""Rows of a task other than the next token: a text or a pair of texts per row, padded to the longest of its batch.

    input_ids        int64  [batch, sequence]   special tokens and text, then padding
    attention_mask   int64  [batch, sequence]   1 where a token stands, 0 for padding
    token_type_ids   int64  [batch, sequence]   only for pairs: 1 in the second text

    task                     targets                                 mask: which of them count
    masked_lm                [batch, sequence]  the masked tokens    the masked tokens, or all tokens (positions: all)
    classification           [batch, 1]         class                all
    regression               [batch, 1]         number, float32      all
    token_classification     [batch, sequence]  class                first token of each word
    embedding                [batch, 1]         class, or 0          all

With ``positions: all`` a batch has in addition

    text_mask        bool   [batch, sequence]   the masked tokens: where losses on the text are computed
    text_weight      float  []                  factor of the losses on the text: tokens / masked tokens, of all rows

A step divides all its losses by the number of its tokens (see :mod:`distill.training.module`). With this factor, the
loss on the text becomes a mean over the masked tokens. The factor is computed once from all training rows, and not from
a batch, so that the gradient does not depend on the size of the micro-batches. It is below 1 / share if most rows are
short, because each row masks at least one token, and above it if most are long, because special tokens are never
masked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from distill.core.batch import IGNORED
from distill.core.tasks import MaskedLM, ModelTask
from distill.data.masking import Masking
from distill.data.order import EndlessOrder
from distill.data.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

FACTS, IDS = "facts.json", "ids.bin"
RowPosition = tuple[int, int]
"""(position in the endless list of training rows, row number); the position is negative outside of training."""


@dataclass(frozen=True)
class RowFile:
    """Rows on disk: a folder with ``ids.bin`` and ``bounds.npy``, and what a task adds.

    Attributes:
        path: path of the folder.
        num_rows: number of rows in it.
        num_tokens: number of tokens in it, including special ones.
        num_cut: number of rows whose text was too long for ``data.sequence_length``.
        num_repeated: number of rows left out of training because they are in the validation text.
        before, after: number of special tokens at the two ends of a row, which are never masked.
        classes: names of the classes, in the order of the logits.
        tally: counts of the rows, with those that could not be used.
    """

    path: str
    num_rows: int
    num_tokens: int
    num_cut: int = 0
    num_repeated: int = 0
    before: int = 0
    after: int = 0
    classes: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def read(cls, folder: Path) -> RowFile:
        """Read what :meth:`write` has written."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return cls(str(folder), **{**facts, "classes": tuple(facts["classes"]), "tally": Tally(**facts["tally"])})

    def write(self, folder: Path) -> None:
        """Write everything except the arrays."""
        facts = {key: value for key, value in asdict(self).items() if key != "path"}
        (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def array(self, name: str) -> np.ndarray:
        """An array of the folder, memory-mapped: ``ids`` uint32 [tokens], ``bounds`` int64 [rows + 1], ``seconds``
        int64 [rows] (tokens before the second text), ``targets`` [rows] or [tokens]."""
        found: np.ndarray
        if name == "ids":  # written as they come, so without a header that has their number
            found = np.memmap(Path(self.path) / IDS, np.uint32, mode="r", shape=(self.num_tokens,))
        else:
            found = np.lib.format.open_memmap(Path(self.path) / f"{name}.npy", mode="r")  # refuses objects
        return found


class TextRows(Dataset[dict[str, "Tensor"]]):
    """Rows for a task; see the top of this file.

    Args:
        file: the rows on disk.
        task: the recipe's task.
        filling: id that pads.
        masking: how tokens are masked; required only for masked_lm.
        chosen: numbers of the rows to use, in order; None: all.
    """

    packing = "padded"

    def __init__(
        self, file: RowFile, task: ModelTask, filling: int, masking: Masking | None, chosen: np.ndarray | None = None
    ):
        self.file, self.task, self.filling, self.masking = file, task, filling, masking
        self.chosen = np.arange(file.num_rows) if chosen is None else chosen
        self._arrays: dict[str, np.ndarray] = {}
        self._weight: float | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, places: Sequence[RowPosition | int]) -> dict[str, Tensor]:
        """The rows at these places as a batch; a bare number is a row outside of training."""
        pairs = [place if isinstance(place, tuple) else (-1, place) for place in places]
        rows = [(position, int(self.chosen[number])) for position, number in pairs]
        spans = [(int(self._array("bounds")[row]), int(self._array("bounds")[row + 1])) for _, row in rows]
        width = max(end - start for start, end in spans)
        ids = np.full((len(rows), width), self.filling, np.int64)  # [batch, sequence]
        attended = np.zeros(ids.shape, np.int64)
        for at, (start, end) in enumerate(spans):
            ids[at, : end - start], attended[at, : end - start] = self._array("ids")[start:end], 1
        batch = {"attention_mask": attended}
        if (Path(self.file.path) / "seconds.npy").is_file():
            seconds = self._array("seconds")[[row for _, row in rows]]  # [batch]
            batch["token_type_ids"] = ((np.arange(width) >= seconds[:, None]) & (attended > 0)).astype(np.int64)
        if self.masking is not None:
            batch |= self._masked(self.masking, ids, attended, rows)
        else:
            batch |= {"input_ids": ids, **self._labels(rows, spans, width)}
        return {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}

    def _masked(
        self, masking: Masking, ids: np.ndarray, attended: np.ndarray, rows: Sequence[RowPosition]
    ) -> dict[str, np.ndarray]:
        """Inputs with masked tokens, and what is predicted."""
        seen, hidden = ids.copy(), np.zeros(ids.shape, bool)
        for at, (position, row) in enumerate(rows):
            size = int(attended[at].sum())
            can = np.zeros(ids.shape[1], bool)
            can[self.file.before : size - self.file.after] = True
            seen[at], hidden[at] = masking.hide(ids[at], can, position, row)
        batch = {"input_ids": seen, "targets": ids}
        assert isinstance(self.task, MaskedLM)
        if self.task.positions == "masked" or any(position < 0 for position, _ in rows):
            return {**batch, "mask": hidden}
        weight = np.asarray(self._text_weight(), np.float32)
        return {**batch, "mask": attended > 0, "text_mask": hidden, "text_weight": weight}

    def _text_weight(self) -> float:
        """Number of tokens of all rows on disk / number of tokens that are masked in them."""
        if self._weight is None:
            assert self.masking is not None
            hidden = self._num_hidden(self.masking, np.diff(self._array("bounds")))
            self._weight = self.file.num_tokens / max(hidden, 1)
        return self._weight

    def _num_hidden(self, masking: Masking, lengths: np.ndarray) -> int:
        """Number of tokens that are masked in rows of these lengths. lengths: int64 [rows]"""
        can = np.maximum(lengths - self.file.before - self.file.after, 0)
        return int(np.where(can > 0, np.maximum(1, np.round(masking.spec.share * can)), 0).sum())

    def _labels(
        self, rows: Sequence[RowPosition], spans: Sequence[tuple[int, int]], width: int
    ) -> dict[str, np.ndarray]:
        if self.task.head == "token_classification":
            targets = np.full((len(rows), width), IGNORED, np.int64)  # [batch, sequence]
            for at, (start, end) in enumerate(spans):
                targets[at, : end - start] = self._array("targets")[start:end]
            return {"targets": np.maximum(targets, 0), "mask": targets != IGNORED}
        shape = (len(rows), 1)
        if not (Path(self.file.path) / "targets.npy").is_file():
            return {"targets": np.zeros(shape, np.int64), "mask": np.ones(shape, bool)}
        targets = self._array("targets")[[row for _, row in rows]].reshape(shape)
        return {"targets": targets, "mask": np.ones(shape, bool)}

    def only(self, numbers: np.ndarray) -> TextRows:
        """A subset of the rows. numbers: int64 [rows]"""
        some = copy(self)
        some.chosen = self.chosen[numbers]
        return some

    def lengths(self) -> np.ndarray:
        """Number of tokens in each row, without padding. int64 [rows]"""
        return np.diff(self._array("bounds"))[self.chosen]

    def num_predictions(self) -> int:
        """Number of predictions that count in all rows together."""
        if self.masking is not None:
            return self._num_hidden(self.masking, self.lengths())
        if self.task.head == "token_classification":
            counted = np.concatenate([[0], np.cumsum(self._array("targets") != IGNORED)])
            bounds = self._array("bounds")
            return int((counted[bounds[self.chosen + 1]] - counted[bounds[self.chosen]]).sum())
        return len(self)

    def ids(self) -> np.ndarray:
        """The tokens of all rows, memory-mapped. uint32 [tokens]"""
        return self._array("ids")

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = self.file.array(name)
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        # each worker maps the files itself
        return self.__dict__ | {"_arrays": {}}


class PlacesOf(EndlessOrder):
    """An order that yields (position, row number); masking derives the masked tokens from the position.

    Args:
        order: the order of the rows.
    """

    def __init__(self, order: EndlessOrder):
        super().__init__(order.taken)
        self.order = order

    def __iter__(self) -> Iterator[list[RowPosition]]:  # type: ignore[override]
        for positions in self.taken:
            yield [(position, self.order.row_at(position)) for position in positions]

    def row_at(self, position: int) -> int:
        """See :class:`~distill.data.order.EndlessOrder`."""
        return self.order.row_at(position)
