"""Adaptive KL: forward KL for tokens whose head is wrong, reverse KL for tokens whose tail is.

    loss = T^2 * (w * KL(p || q) + (1 - w) * KL(q || p)),   w = gap(head) / (gap(head) + gap(tail)),
    gap(S) = sum_{v in S} |p_v - q_v|,   p = softmax(teacher / T),  q = softmax(student / T),
    head = the teacher's likeliest tokens, as few as hold the mass mu; tail = the others

w is a number of each token, taken anew at each step and treated as a constant: no gradient flows through it (a student
could otherwise lower its loss by moving its error to the cheaper side). So the value is not a potential of the
gradient, and a falling loss says less than with the others; watch ``kl``.

Forward KL mends the head of a distribution first and reverse KL its tail; this is for short runs in which neither has
time to finish. In a long run both have the same optimum and forward KL is cheaper: this one sorts the vocabulary.

Source: Wu et al. 2024, arXiv 2404.02657, section on adaptive KL; mu = 0.5 as there. The token with which the mass
reaches mu belongs to the head here, as in the definition of a smallest set; the authors' code counts it to the tail
unless it is the first. T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, masked_sum, shared_log_probs
from distill.losses.schedule import Fraction, Positive, number

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveKL(LossSpec):
    """Forward and reverse KL, mixed for each token by where its error lies: in the teacher's head or in its tail."""

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Fraction = 0.5
    """Mass of the teacher's head, between 0 and 1 (both excluded)."""
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        mu, temperature = number(self.mu), number(self.temperature)
        return adaptive_kl(student_logits, teacher_logits, mask, mu=mu, temperature=temperature)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, mu: float = 0.5, temperature: float = 1.0
) -> LossTerm:
    """The mixture of both KLs summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        mu: mass of the teacher's head, 0 < mu < 1.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    w = head_share(log_p, log_q.detach(), mu)
    return masked_sum(temperature**2 * (w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)), mask)


def head_share(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """Share of the error that lies in the teacher's head, [..., vocabulary] twice -> [...], 0 to 1; 0 without error."""
    p, likeliest = log_p.exp().sort(-1, descending=True)
    gap = (p - log_q.exp().gather(-1, likeliest)).abs()
    head = p.cumsum(-1) - p < mu  # the mass before a token is short of mu; the likeliest one is always in
    whole = gap.sum(-1)
    return gap.masked_fill(~head, 0.0).sum(-1) / whole.clamp(min=1e-30)
