"""Generalised Jensen-Shannon divergence: KL of both models to their mixture, between forward and reverse KL.

    loss = T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)),   m = beta * p + (1 - beta) * q,
    p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * (1 - beta) * q * (r - sum_v q_v r_v),   r = log q - log m

It is bounded (by T^2 log 2, and by less if beta is close to 0 or 1), so that no single token dominates the gradient.
Prefer it if the student is far from the teacher, or is trained on text that it generates. For a pruned student, which
is already close to its teacher, forward KL is the better choice.

Limits: loss / beta converges to forward KL for beta -> 0, and loss / (1 - beta) to reverse KL for beta -> 1. The loss
itself converges to 0 at both ends, and if the models are close to each other, its gradient is beta (1 - beta) times
that of the KL. So beta = 0 and beta = 1 raise an error: use :mod:`forward_kl <distill.losses.forward_kl>` or
:mod:`reverse_kl <distill.losses.reverse_kl>` instead, and increase the weight if beta is close to 0 or 1.

Source: Agarwal et al. 2023, arXiv 2306.13649 (GKD), equation 1; for T^2 see arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, log_mixture, masked_sum, shared_log_probs
from distill.losses.schedule import Fraction, Positive, number
from distill.losses.tile import through_softmax
from distill.numerics.kl import kl, kl_summands
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class JensenShannon(LossSpec):
    """Generalised Jensen-Shannon divergence, between forward KL (small beta) and reverse KL (large beta)."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Fraction = 0.5
    """Weight of the teacher in the mixture, between 0 and 1 (both excluded: use forward_kl or reverse_kl instead)."""
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        beta, temperature = number(self.beta), number(self.temperature)
        return jensen_shannon(student_logits, teacher_logits, mask, beta=beta, temperature=temperature)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        beta, temperature = number(self.beta), number(self.temperature)
        pair = tile.pair(temperature)
        log_m = tile.mixture(pair.p, pair.q, beta).log_()  # [tokens, vocabulary]
        with tile.borrow(log_m) as scratch:
            of_teacher = kl(pair.log_p, log_m, pair.p, out=scratch).sum()
        # the gradient through m is 0, because sum_v m_v d log m_v = 0; so only q (log q - log m) remains
        of_student = kl_summands(pair.log_q, log_m, pair.q, out=tile.take(log_m))  # [tokens, vocabulary]
        value = temperature**2 * (beta * of_teacher + (1 - beta) * of_student.sum())
        return value, through_softmax(of_student, pair.q).mul_(temperature * (1 - beta))


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> LossTerm:
    """Generalised JSD times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        beta: weight of the teacher in the mixture, 0 < beta < 1.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    log_m = log_mixture(log_p, log_q, beta)
    return masked_sum(temperature**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)), mask)
