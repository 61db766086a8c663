"""Skewed forward KL: forward KL to a mixture that holds a little of the teacher itself.

    loss = T^2 * KL(p || m),   m = alpha * p + (1 - alpha) * q,   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = -T * (1 - alpha) * q * (r - sum_v q_v r_v),   r = p / m

The mixture is nowhere less than alpha * p, so a token that the student has ruled out costs log(1 / alpha) at most and
its gradient stays small: steadier than forward KL where student and teacher are far apart, and on the student's own
text. Where they are near, it is forward KL with (1 - alpha)^2 of its gradient and nothing is gained.

Source: Ko et al. 2024, arXiv 2402.03898 (DistiLLM), skew KL; alpha = 0.1 as there. T^2 as in
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


class SkewedForwardKL(LossSpec):
    """Forward KL to a mixture of student and teacher, KL(teacher || alpha * teacher + (1 - alpha) * student)."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: Fraction = 0.1
    """Teacher's share of the mixture, between 0 and 1 (both excluded: at 0 it is forward_kl, at 1 nothing is left)."""
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        alpha, temperature = number(self.alpha), number(self.temperature)
        return skewed_forward_kl(student_logits, teacher_logits, mask, alpha=alpha, temperature=temperature)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        alpha, temperature = number(self.alpha), number(self.temperature)
        pair = rows.pair(temperature)
        m = rows.mixture(pair.p, pair.q, alpha)
        slope = rows.copy(pair.p).div_(m).mul_(pair.q)
        value = temperature**2 * rows.total(rows.difference(pair.log_p, m.log_()).mul_(pair.p)).sum()
        return value, through_softmax(slope, pair.q).mul_(-temperature * (1 - alpha))


def skewed_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> LossTerm:
    """KL(teacher || mixture) summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        alpha: the teacher's share of the mixture, 0 < alpha < 1.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_p, log_mixture(log_p, log_q, alpha)), mask)
