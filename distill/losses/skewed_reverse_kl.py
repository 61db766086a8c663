"""Skewed reverse KL: reverse KL to a mixture that holds a little of the student itself.

    loss = T^2 * KL(q || m),   m = alpha * q + (1 - alpha) * p,   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * q * (r - sum_v q_v r_v),   r = log q - log m - alpha * q / m

The mixture is nowhere less than alpha * q, so a token that the teacher rules out costs log(1 / alpha) at most instead
of exploding: prefer it to reverse KL wherever reverse KL is wanted. It keeps the price of reverse KL: modes instead of
coverage, and usually a worse perplexity. The gradient flows through both places of q.

Source: Ko et al. 2024, arXiv 2402.03898 (DistiLLM), skew reverse KL; alpha = 0.1 as there. T^2 as in
arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, log_mixture, masked_sum, shared_log_probs
from distill.losses.rows import through_softmax
from distill.losses.schedule import Fraction, Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class SkewedReverseKL(LossSpec):
    """Reverse KL to a mixture of student and teacher, KL(student || alpha * student + (1 - alpha) * teacher)."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: Fraction = 0.1
    """Student's share of the mixture, between 0 and 1 (both excluded: at 0 it is reverse_kl, at 1 nothing is left)."""
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        alpha, temperature = number(self.alpha), number(self.temperature)
        return skewed_reverse_kl(student_logits, teacher_logits, mask, alpha=alpha, temperature=temperature)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        alpha, temperature = number(self.alpha), number(self.temperature)
        pair = rows.pair(temperature)
        m = rows.mixture(pair.q, pair.p, alpha)
        share = rows.copy(pair.q).div_(m).mul_(pair.q)
        slope = rows.difference(pair.log_q, m.log_()).mul_(pair.q)
        value = temperature**2 * slope.sum()
        return value, through_softmax(slope.sub_(share, alpha=alpha), pair.q).mul_(temperature)


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> LossTerm:
    """KL(student || mixture) summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        alpha: the student's share of the mixture, 0 < alpha < 1.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_q, log_mixture(log_q, log_p, alpha)), mask)
