"""A teacher whose output is cached. Only its head is in memory, and not the model.

The batches hold the signal (see :class:`distill.data.teacher_cache.cache.CachedRows`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.data.teacher_cache.base import HIDDEN, IDS
from distill.data.teacher_cache.fidelity import signal_of
from distill.losses.sparse import SparseSignal, refusal
from distill.models.head import load_head
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distill.losses.base import LossSpec
    from distill.losses.head_losses import Head, Signal


class CachedTeacher(Teacher):
    """Makes the teacher's signal from the cached output in a batch.

    Args:
        vocabulary: number of rows of the teacher's head.
        head: file written by :func:`distill.models.head.save_head`, for batches with hidden states.
        whole: whether the training batches contain hidden states; validation batches always do.
        dtype: dtype of the head in memory; None for the dtype of the file.
    """

    def __init__(self, vocabulary: int, head: Path, *, whole: bool, dtype: torch.dtype | None = None):
        self.vocabulary, self.whole = vocabulary, whole
        self._file, self._dtype = head, dtype
        self._head: Head | None = None

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Check that the losses can be computed from this signal.

        Raises:
            InputError: a loss needs the teacher's whole distribution.
        """
        if not self.whole and (why := refusal(losses)):
            raise InputError(f"losses: {why}")

    def move(self, device: torch.device) -> None:
        """Load the head to the device of the batches."""
        if self._head is None or self._head.parameters[0].device != device:
            self._head = load_head(self._file, dtype=self._dtype, device=device)

    def signal(self, batch: dict[str, Tensor]) -> Signal | SparseSignal:
        """The teacher's signal for a batch.

        Raises:
            InputError: the batch contains no cached output.
        """
        if HIDDEN not in batch and IDS not in batch:
            raise InputError("rows of this batch are not in the teacher's cache; run its cache_teacher stage again")
        if HIDDEN in batch and self._head is not None:
            # hidden states are stored in bf16; the head computes in its own dtype
            batch = batch | {HIDDEN: batch[HIDDEN].to(self._head.parameters[0].dtype)}
        return signal_of(batch, self.vocabulary, self._head)
