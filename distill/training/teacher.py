"""The contract of a teacher: a source of signal for the batches that a student trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from distill.losses.base import LossSpec
    from distill.losses.head import Signal
    from distill.losses.sparse import SparseSignal


class Teacher(ABC):
    """Says for each batch what a student should learn. Never a part of the student's module tree.

    Attributes:
        model: runs forward at every batch; None when nothing is computed.
    """

    model: PreTrainedModel | None = None

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Refuse what cannot be taught, once, before anything is trained.

        Raises:
            InputError: with the loss, or what else it is, by name.
        """
        return

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Make ready for batches on the student's device; called at the start of every training and validation."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Share out what is in memory of a model of its own among the ranks, for the rest of its life."""
        return

    @abstractmethod
    def signal(self, batch: dict[str, Tensor]) -> Signal | SparseSignal:
        """The teacher's side of a batch (see :class:`distill.training.module.DistillationModule`), without graph.

        Raises:
            InputError: it has nothing to say about this batch.
        """
