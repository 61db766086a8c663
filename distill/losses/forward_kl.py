"""Forward KL: the student learns to cover everything to which the teacher gives probability.

    loss = T^2 * sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T),  q = softmax(student / T)
    d loss / d student = T * (q - p)

This is the default, and the only loss of Minitron's recipes. It is mode-covering: the student spreads its probability
over all modes of the teacher. A student that is too small for this may generate better text with :mod:`reverse_kl
<distill.losses.reverse_kl>`.

If it is the only loss and the temperature is 1, training calls :func:`distill.numerics.kl.kl_and_gradient_`.

Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (the factor T^2 keeps the size of the gradient
independent of T); Muralidharan et al. 2024, arXiv 2407.14679 (Minitron).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.losses.schedule import Positive, number
from distill.losses.tile import InPlace
from distill.numerics.kl import kl, kl_and_gradient_
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class ForwardKL(LossSpec):
    """Kullback-Leibler divergence from teacher to student, KL(teacher || student)."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return forward_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        temperature = number(self.temperature)
        pair = tile.pair(temperature)
        value = temperature**2 * tile.forward_kl(temperature).sum()
        return value, tile.difference(pair.q, pair.p).mul_(temperature)

    @property
    def has_in_place(self) -> bool:
        """At temperature 1."""
        return self.temperature == 1.0

    def in_place(self, tile: LogitTile) -> InPlace:
        """It overwrites the student's logits with the gradient, and the teacher's logits too."""
        student, teacher = tile.shared()
        with tile.borrow(student) as scratch:
            value = kl_and_gradient_(teacher, student, scratch).sum()
        return InPlace(value, value)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> LossTerm:
    """KL(teacher || student) times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    return masked_sum(temperature**2 * kl(log_p, log_q), mask)
