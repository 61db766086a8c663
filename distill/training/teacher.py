"""The contract of a teacher, which gives the signal that a student learns from."""

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
    from distill.losses.head_losses import Signal
    from distill.losses.sparse import SparseSignal


class Teacher(ABC):
    """Gives what the student should learn from each batch. It is never a submodule of the training module.

    Attributes:
        model: model that computes the signal for every batch; None if there is none (a cache).
    """

    model: PreTrainedModel | None = None

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Check, before training, that the losses can be computed from this teacher's signal.

        Raises:
            InputError: a loss cannot, or something else is wrong with this teacher.
        """
        return

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Prepare for batches on this device (the student's); called before every training and validation."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the teacher's model over the ranks of the mesh, if there is a model in memory."""
        return

    @abstractmethod
    def signal(self, batch: dict[str, Tensor]) -> Signal | SparseSignal:
        """The teacher's signal for a batch (see :class:`distill.training.module.DistillationModule`), without a graph.

        Raises:
            InputError: the teacher has no signal for this batch.
        """
