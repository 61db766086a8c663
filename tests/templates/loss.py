"""A loss to start from: half of the squared distance between the probabilities.

    loss = 1/2 * sum_v (p_v - q_v)^2,   p = softmax(teacher),  q = softmax(student)

It is bounded, so that no single token dominates the gradient. Prefer a KL if the tail of the distribution matters.

Source: Brier 1950, Monthly Weather Review 78 (1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class TemplateLoss(LossSpec):
    """Half of the squared distance between the probabilities."""

    kind: Literal["template_loss"] = "template_loss"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return template_loss(student_logits, teacher_logits, mask)


def template_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> LossTerm:
    """The loss summed over the counted tokens, without a unit.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, 1.0)
    return masked_sum(0.5 * (log_p.exp() - log_q.exp()).square().sum(-1), mask)
