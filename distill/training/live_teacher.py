"""A teacher that is in memory and computes its output for every batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from distill.core.batch import model_inputs
from distill.losses.head_losses import Head, Signal
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
    """A frozen model that computes in its own precision, independent of the precision of training.

    Args:
        model: the model. It is frozen and set to evaluation mode.
        device: device of the model; None for the student's device. If the devices differ, its head is copied to the
            student's device, and hidden states are copied there chunk by chunk, because they are much smaller than
            logits.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None):
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._device = device
        self._copy: Head | None = None
        self._sharded = False

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Check that the model's logits are those of its head."""
        check_head(self.model)

    def move(self, device: torch.device) -> None:
        """Move the model to its own device, or to the student's."""
        if self._sharded:
            return
        move(self.model, self._device or device)
        away = self.model.device != device
        self._copy = head_copy(self.model, device) if away else None

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the model, unless it is on another kind of device than the student."""
        if self._device is None or self._device.type == mesh.device_type:
            shard(self.model, mesh)
            self._sharded = True

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """The teacher's final hidden states and its head."""
        head = self._copy or output_head(self.model)
        # inference_mode keeps no version counters, and gathering a sharded weight needs them
        quiet = torch.no_grad() if self._sharded else torch.inference_mode()
        with quiet, torch.autocast(self.model.device.type, enabled=False):
            hidden = hidden_states(self.model, **model_inputs(batch, self.model.device))  # [batch, sequence, hidden]
        return Signal(hidden, head if is_plain(head.logits, hidden) else Head(_in_own_precision(head.logits)))


def _in_own_precision(logits: Logits) -> Logits:
    """The head, called without autocast, so that it computes in its own dtype."""

    def outside(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return logits(rows)

    return outside
