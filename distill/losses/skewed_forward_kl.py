"""Skewed forward KL: forward KL between the teacher and a mixture of teacher and student.

    loss = T^2 * KL(p || m),   m = alpha * p + (1 - alpha) * q,   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = -T * (1 - alpha) * q * (r - sum_v q_v r_v),   r = p / m

The mixture is nowhere smaller than alpha * p, so a token to which the student gives no probability costs at most
``log(1 / alpha)``, and its gradient stays small. This makes training more stable than forward KL if student and teacher
are far apart, and on text that the student generates. If they are close to each other, the gradient is (1 - alpha)^2
times that of forward KL, without an advantage.

Source: Ko et al. 2024, arXiv 2402.03898 (DistiLLM), skew KL, which also uses alpha = 0.1. For T^2 see arXiv 1503.02531,
section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import masked_sum, shared_log_probs
from distill.losses.skewed import SkewedSpec, kl_to_mixture
from distill.losses.tile import through_softmax
from distill.numerics.kl import kl
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class SkewedForwardKL(SkewedSpec):
    """KL between the teacher and a mixture, KL(teacher || alpha * teacher + (1 - alpha) * student)."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        alpha, temperature = self.numbers()
        return skewed_forward_kl(student_logits, teacher_logits, mask, alpha=alpha, temperature=temperature)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        alpha, temperature = self.numbers()
        pair = tile.pair(temperature)
        m = tile.mixture(pair.p, pair.q, alpha)  # [tokens, vocabulary]
        slope = tile.copy(pair.p).div_(m).mul_(pair.q)  # q r, [tokens, vocabulary]
        with tile.borrow(m) as scratch:
            value = temperature**2 * kl(pair.log_p, m.log_(), pair.p, out=scratch).sum()
        return value, through_softmax(slope, pair.q).mul_(-temperature * (1 - alpha))


def skewed_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> LossTerm:
    """KL(teacher || mixture) times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        alpha: weight of the teacher in the mixture, 0 < alpha < 1.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl_to_mixture(log_p, log_q, alpha), mask)
