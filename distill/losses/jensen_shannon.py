"""Generalised Jensen-Shannon divergence: both models against their mixture, between forward and reverse KL.

    loss = T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)),   m = beta * p + (1 - beta) * q,
    p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * (1 - beta) * q * (r - sum_v q_v r_v),   r = log q - log m

It is bounded (by T^2 log 2, and less for a beta near an end), so that no token can pull without limit; prefer it where
the student is far from the teacher or writes its own text. Plain forward KL is the better start for a pruned student,
which is near its teacher already.

Limits: loss / beta -> forward KL for beta -> 0, and loss / (1 - beta) -> reverse KL for beta -> 1. The loss itself goes
to 0 at both ends, and its gradient near agreement is beta (1 - beta) times that of the KL; so the ends are refused, not
replaced by a loss of another size: use :mod:`forward_kl <distill.losses.forward_kl>` or
:mod:`reverse_kl <distill.losses.reverse_kl>` for them, and raise the weight for a beta near one.

Source: Agarwal et al. 2023, arXiv 2306.13649 (GKD), equation 1; T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, log_mixture, masked_sum, shared_log_probs
from distill.losses.rows import through_softmax
from distill.losses.schedule import Fraction, Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class JensenShannon(LossSpec):
    """Jensen-Shannon divergence, generalised: from near forward KL (small beta) to near reverse KL (large beta)."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Fraction = 0.5
    """Teacher's share of the mixture, between 0 and 1 (both excluded: there it is forward_kl and reverse_kl)."""
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        beta, temperature = number(self.beta), number(self.temperature)
        return jensen_shannon(student_logits, teacher_logits, mask, beta=beta, temperature=temperature)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        beta, temperature = number(self.beta), number(self.temperature)
        pair = rows.pair(temperature)
        log_m = rows.mixture(pair.p, pair.q, beta).log_()
        of_teacher = rows.total(rows.difference(pair.log_p, log_m).mul_(pair.p)).sum()
        of_student = rows.difference(pair.log_q, log_m).mul_(pair.q)
        value = temperature**2 * (beta * of_teacher + (1 - beta) * of_student.sum())
        return value, through_softmax(of_student, pair.q).mul_(temperature * (1 - beta))


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> LossTerm:
    """Generalised JSD summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        beta: the teacher's share of the mixture, 0 < beta < 1.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    log_m = log_mixture(log_p, log_q, beta)
    return masked_sum(temperature**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)), mask)
