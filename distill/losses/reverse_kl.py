"""Reverse KL: the student keeps to what the teacher thinks likely.

    loss = T^2 * sum_v q_v (log q_v - log p_v),   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * q * (r - sum_v q_v r_v),   r = log q - log p

It seeks modes: better samples from a student that cannot cover the teacher, at the price of diversity and usually of
perplexity. Needs the teacher's whole distribution; on a truncated one it collapses.

Source: Gu et al. 2023, arXiv 2306.08543 (MiniLLM); T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, masked_sum, shared_log_probs
from distill.losses.rows import through_softmax
from distill.losses.schedule import Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class ReverseKL(LossSpec):
    """Kullback-Leibler divergence from student to teacher, KL(student || teacher)."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return reverse_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        temperature = number(self.temperature)
        pair = rows.pair(temperature)
        slope = rows.difference(pair.log_q, pair.log_p).mul_(pair.q)
        value = temperature**2 * slope.sum()
        return value, through_softmax(slope, pair.q).mul_(temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> LossTerm:
    """KL(student || teacher) summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_q, log_p), mask)
