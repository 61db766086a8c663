"""Reverse KL: the student learns to avoid what the teacher finds unlikely.

    loss = T^2 * sum_v q_v (log q_v - log p_v),   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * q * (r - sum_v q_v r_v),   r = log q - log p

It is mode-seeking: a student that is too small to cover the teacher's distribution generates better text, but less
diverse text, and its perplexity is usually worse. It needs the teacher's whole distribution; with a truncated
distribution the student collapses.

Source: Gu et al. 2023, arXiv 2306.08543 (MiniLLM); for T^2 see arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.losses.schedule import Positive, number
from distill.losses.tile import through_softmax
from distill.numerics.kl import kl, kl_summands
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class ReverseKL(LossSpec):
    """Kullback-Leibler divergence from student to teacher, KL(student || teacher)."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return reverse_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        temperature = number(self.temperature)
        pair = tile.pair(temperature)
        # q r: the summands of the loss, and the input of the softmax's backward pass
        slope = kl_summands(pair.log_q, pair.log_p, pair.q, out=tile.take(pair.q))  # [tokens, vocabulary]
        value = temperature**2 * slope.sum()
        return value, through_softmax(slope, pair.q).mul_(temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> LossTerm:
    """KL(student || teacher) times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_q, log_p), mask)
