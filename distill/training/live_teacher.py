"""A teacher that is in memory and runs forward beside the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from distill.losses.head import Signal
from distill.models.head import check_head, hidden_states, output_head
from distill.models.load import move
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.losses.base import LossSpec


class LiveTeacher(Teacher):
    """A frozen model, in its own precision.

    Args:
        model: frozen and put into evaluation mode here.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: PreTrainedModel = model.eval().requires_grad_(False)

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Refuse a model whose logits are not its head's."""
        check_head(self.model)

    def move(self, device: torch.device) -> None:
        """Bring the model to the student's device."""
        move(self.model, device)

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """Its final hidden states and its head."""
        with torch.inference_mode():
            return Signal(hidden_states(self.model, batch["input_ids"]), output_head(self.model))
