"""Squared error of a predicted number: the standard loss for task: regression; also the control for distillation.

    loss = (s - y)^2

per text, where s is the student's score and y the label. It needs no teacher.

Source: the squared error of GLUE's STS-B, as in Devlin et al. 2018, arXiv 1810.04805.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.losses.base import LossSpec, masked_sum
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class LabelMSE(LossSpec):
    """Squared difference from the label; for task: regression."""

    needs_teacher: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    compares: ClassVar[Literal["distributions", "values"]] = "values"

    kind: Literal["label_mse"] = "label_mse"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        return label_mse(student_logits, targets, mask)


def label_mse(scores: Tensor, labels: Tensor, mask: Tensor) -> LossTerm:
    """Squared difference, summed over the texts.

    Args:
        scores: [..., 1].
        labels: [...], numbers.
        mask: [...], True for the texts that are counted.
    """
    return masked_sum((scores[..., 0].float() - labels.float()).square(), mask)
