"""The base of both skewed KLs: KL between a distribution and a mixture that contains a part of it.

    KL(a || m),   m = alpha * a + (1 - alpha) * b

The mixture is nowhere smaller than alpha * a, so the loss per token is at most log(1 / alpha). In
:mod:`skewed_forward_kl <distill.losses.skewed_forward_kl>`, a is the teacher; in :mod:`skewed_reverse_kl
<distill.losses.skewed_reverse_kl>`, a is the student.

Source: Ko et al. 2024, arXiv 2402.03898 (DistiLLM), which also uses alpha = 0.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.base import LossSpec, log_mixture
from distill.losses.schedule import Fraction, Positive, number
from distill.numerics.kl import kl

if TYPE_CHECKING:
    from torch import Tensor


class SkewedSpec(LossSpec):
    """Settings of both skewed KLs."""

    alpha: Fraction = 0.1
    """Weight of the first argument of the divergence in the mixture (the teacher in skewed_forward_kl, the student in
    skewed_reverse_kl), between 0 and 1. Both bounds are excluded: with 0 it is the plain KL, and with 1 the loss is
    0."""
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    def numbers(self) -> tuple[float, float]:
        """The values of alpha and temperature, which must not be schedules."""
        return number(self.alpha), number(self.temperature)


def kl_to_mixture(log_a: Tensor, log_b: Tensor, alpha: float) -> Tensor:
    """KL(a || alpha * a + (1 - alpha) * b) per token, in nats: two tensors [..., vocabulary] -> [...]."""
    return kl(log_a, log_mixture(log_a, log_b, alpha))
