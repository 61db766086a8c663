"""Forward KL: the student covers all that the teacher thinks possible.

    loss = T^2 * sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * (q - p)

The default, and the only loss of Minitron's recipes. It spreads the student over the teacher's modes; a student much
too small to do so may read better with :mod:`reverse_kl <distill.losses.reverse_kl>`.

Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (with T^2, so that the gradient keeps its size when T
changes); Muralidharan et al. 2024, arXiv 2407.14679 (Minitron).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, masked_sum, shared_log_probs
from distill.losses.schedule import Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class ForwardKL(LossSpec):
    """Kullback-Leibler divergence from teacher to student, KL(teacher || student)."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return forward_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        temperature = number(self.temperature)
        if rows.alone and temperature == 1.0:
            return rows.forward_kl_in_place()
        pair = rows.pair(temperature)
        return temperature**2 * rows.forward_kl(temperature).sum(), rows.difference(pair.q, pair.p).mul_(temperature)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> LossTerm:
    """KL(teacher || student) summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_p, log_q), mask)
