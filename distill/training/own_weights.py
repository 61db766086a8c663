"""The student as it starts, as its own teacher, with no second copy of its weights in memory.

Adapters leave the weights below them frozen, so with the adapters and the fake-quant layers off the student computes
what it computed before its training, to the last bit. With quantization-aware training this is the unquantized model;
without, an anchor for a loss on the text. A student whose own weights are trained has no start left and is refused: its
unquantized weights of the moment would be a teacher that wanders off with the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.losses.head import Head, Signal
from distill.models.head import hidden_states, output_head
from distill.models.lora import ADAPTER, without_adapters
from distill.quantization.fake_quant import quantizer_tensors, unquantized
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from distill.losses.base import LossSpec


class OwnWeights(Teacher):
    """Asks the student itself, with all that is trained switched off.

    Args:
        student: wrapped by :func:`distill.training.assemble.assemble` with adapters.
    """

    def __init__(self, student: PreTrainedModel):
        self.model: PreTrainedModel = student

    def check(self, losses: Iterable[LossSpec]) -> None:
        """Refuse a student whose start is lost while it trains."""
        scales = quantizer_tensors(self.model)  # off with the fake-quant
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and ADAPTER not in name and name not in scales:
                raise InputError(
                    f"the student cannot be its own teacher: {name} is trained, so its start is lost; train adapters "
                    "(lora), or name the model that it starts from as the teacher, which loads it a second time"
                )

    def move(self, device: torch.device) -> None:
        """Nothing to do: it is where the student is."""

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """The final hidden states and the head of the start."""
        head, module = output_head(self.model), self.model.get_output_embeddings()

        def logits(rows: Tensor) -> Tensor:
            with _start_of(module):
                return head.logits(rows)

        with _start_of(self.model), torch.no_grad():  # not inference_mode, which weights shared out cannot bear
            return Signal(hidden_states(self.model, **model_inputs(batch)), Head(logits))


@contextmanager
def _start_of(part: torch.nn.Module) -> Iterator[None]:
    """Within the block a part of the student computes as before its training, in evaluation mode."""
    training = [module for module in part.modules() if module.training]
    part.eval()
    try:
        with without_adapters(part), unquantized(part):
            yield
    finally:
        for module in training:
            module.training = True
