"""A teacher that is in memory and runs forward beside the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from distill.core.batch import model_inputs
from distill.losses.head import Head, Signal
from distill.losses.projection import Logits, is_plain
from distill.models.head import check_head, head_copy, hidden_states, output_head
from distill.models.load import move
from distill.training.sharded import shard
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from distill.losses.base import LossSpec


class LiveTeacher(Teacher):
    """A frozen model that computes in its own precision, whatever that of training is.

    Args:
        model: frozen and put into evaluation mode here.
        device: where it runs; None is beside the student. From another device its hidden states travel, a chunk at a
            time, to a copy of its head beside the student: logits would be many times as large.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None):
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._device = device
        self._copy: Head | None = None
        self._sharded = False

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Refuse a model whose logits are not its head's."""
        check_head(self.model)

    def move(self, device: torch.device) -> None:
        """Bring the model to its own device, or the student's."""
        if self._sharded:
            return
        move(self.model, self._device or device)
        away = self.model.device != device
        self._copy = head_copy(self.model, device) if away else None

    def shard(self, mesh: DeviceMesh) -> None:
        """Share the model out, unless it has a device of its own."""
        if self._device is None or self._device.type == mesh.device_type:
            shard(self.model, mesh)
            self._sharded = True

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """Its final hidden states and its head."""
        head = self._copy or output_head(self.model)
        # gathering counts the versions of a weight, which inference_mode does not
        quiet = torch.no_grad() if self._sharded else torch.inference_mode()
        with quiet, torch.autocast(self.model.device.type, enabled=False):
            hidden = hidden_states(self.model, **model_inputs(batch, self.model.device))

        return Signal(hidden, head if is_plain(head.logits, hidden) else Head(_in_own_precision(head.logits)))


def _in_own_precision(logits: Logits) -> Logits:
    """The head of a model, called outside of the arithmetic of training."""

    def outside(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return logits(rows)

    return outside
