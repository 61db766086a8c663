"""A teacher that computes with the student's initial weights, without a second copy of them in memory.

With LoRA, the weights below the adapters are frozen. So with the adapters and fake-quant layers switched off, the
student computes exactly what it computed before its training. In quantization-aware training this is the unquantized
model; otherwise it keeps the student close to its start while it is trained on text. A student whose own weights are
trained raises an error: its initial weights are lost, and its current unquantized weights would be a teacher that
drifts with the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.losses.head_losses import Head, Signal
from distill.models.head import hidden_states, output_head
from distill.models.lora import ADAPTER, without_adapters
from distill.quantization.fake_quant import quantizer_tensors, unquantized
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.losses.base import LossSpec


class OwnWeights(Teacher):
    """The student itself, with adapters and fake quantization switched off.

    Args:
        student: student that was wrapped by :func:`distill.training.assemble.assemble`, with LoRA.
    """

    def __init__(self, student: PreTrainedModel):
        self.model: PreTrainedModel = student

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Check that training does not overwrite the student's initial weights."""
        scales = quantizer_tensors(self.model)  # they have no effect while fake quantization is off
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and ADAPTER not in name and name not in scales:
                raise InputError(
                    f"the student cannot be its own teacher: {name} is trained, so its initial weights are "
                    "lost; train adapters (lora), or set teacher to the initial model, which is loaded a second time"
                )

    def move(self, device: torch.device) -> None:
        """Do nothing: the teacher is the student."""

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """The final hidden states and the head of the student before its training."""
        module = self.model.get_output_embeddings()
        # read the head while fake quantization is off, so that it returns the original weight
        with _start_of(self.model), torch.no_grad():
            head = output_head(self.model)

        def logits(rows: Tensor) -> Tensor:
            with _start_of(module):
                return head.logits(rows)

        with _start_of(self.model), torch.no_grad():  # not inference_mode, in which sharded weights cannot be gathered
            return Signal(hidden_states(self.model, **model_inputs(batch)), Head(logits))


@contextmanager
def _start_of(part: torch.nn.Module) -> Iterator[None]:
    """Within the ``with`` block, a part of the student computes what it did before training, in evaluation mode."""
    training = [module for module in part.modules() if module.training]
    part.eval()
    try:
        with without_adapters(part), unquantized(part):
            yield
    finally:
        for module in training:
            module.training = True
