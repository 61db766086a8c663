"""Skewed reverse KL: reverse KL between the student and a mixture of student and teacher.

    loss = T^2 * KL(q || m),   m = alpha * q + (1 - alpha) * p,   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * q * (r - sum_v q_v r_v),   r = log q - log m - alpha * q / m

The mixture is nowhere smaller than alpha * q, so a token to which the teacher gives no probability costs at most
``log(1 / alpha)``, whereas reverse KL has no bound. So prefer it to reverse KL. Like reverse KL it is mode-seeking and
usually gives a worse perplexity. The gradient includes the part through q in the mixture.

Source: Ko et al. 2024, arXiv 2402.03898 (DistiLLM), skew reverse KL, which also uses alpha = 0.1. For T^2 see arXiv
1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import masked_sum, shared_log_probs
from distill.losses.skewed import SkewedSpec, kl_to_mixture
from distill.losses.tile import through_softmax
from distill.numerics.kl import kl_summands
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class SkewedReverseKL(SkewedSpec):
    """KL between the student and a mixture, KL(student || alpha * student + (1 - alpha) * teacher)."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        alpha, temperature = self.numbers()
        return skewed_reverse_kl(student_logits, teacher_logits, mask, alpha=alpha, temperature=temperature)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        alpha, temperature = self.numbers()
        pair = tile.pair(temperature)
        m = tile.mixture(pair.q, pair.p, alpha)  # [tokens, vocabulary]
        # the gradient flows through q and through m: r = (log q - log m) - alpha q / m, and slope is q r
        share = tile.copy(pair.q).div_(m).mul_(pair.q)  # q^2 / m, [tokens, vocabulary]
        slope = kl_summands(pair.log_q, m.log_(), pair.q, out=tile.take(m))  # [tokens, vocabulary]
        value = temperature**2 * slope.sum()
        return value, through_softmax(slope.sub_(share, alpha=alpha), pair.q).mul_(temperature)


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> LossTerm:
    """KL(student || mixture) times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        alpha: weight of the student in the mixture, 0 < alpha < 1.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl_to_mixture(log_q, log_p, alpha), mask)
