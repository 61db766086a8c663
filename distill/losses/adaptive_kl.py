"""Adaptive KL: forward KL for tokens whose head is wrong, reverse KL for tokens whose tail is.

    loss = T^2 * (w * KL(p || q) + (1 - w) * KL(q || p)),   w = gap(head) / (gap(head) + gap(tail)),
    gap(S) = sum_{v in S} |p_v - q_v|,   p = softmax(teacher / T),  q = softmax(student / T),
    head = the teacher's likeliest tokens, as few as hold the mass mu; tail = the others
    d loss / d student = T * (w * (q - p) + (1 - w) * q * (r - sum_v q_v r_v)),   r = log q - log p

w is a number of each token, taken anew at each step and treated as a constant: no gradient flows through it (a student
could otherwise lower its loss by moving its error to the cheaper side). So the value is not a potential of the
gradient, and a falling loss says less than with the others; watch ``kl``.

Forward KL mends the head of a distribution first and reverse KL its tail; this is for short runs in which neither has
time to finish. In a long run both have the same optimum and forward KL is cheaper: this one sorts the vocabulary.
Tokens exactly as likely as the last one of the head belong to it, whatever their order.

Source: Wu et al. 2024, arXiv 2404.02657; mu = 0.5 as there. The token with which the mass
reaches mu belongs to the head here, as in the definition of a smallest set; the authors' code counts it to the tail
unless it is the first. T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, kl, masked_sum, shared_log_probs
from distill.losses.rows import through_softmax
from distill.losses.schedule import Fraction, Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


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

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        mu, temperature = number(self.mu), number(self.temperature)
        pair = rows.pair(temperature)
        gap = rows.difference(pair.q, pair.p)
        w = head_share(pair.p, rows.copy(gap).abs_(), mu)
        slope = rows.difference(pair.log_q, pair.log_p).mul_(pair.q)
        value = temperature**2 * (w * rows.forward_kl(temperature) + (1 - w) * slope.sum(-1)).sum()
        w = w.unsqueeze(-1)
        return value, through_softmax(slope, pair.q).lerp_(gap, w).mul_(temperature)


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
    p = log_p.exp()
    w = head_share(p, (log_q.detach().exp() - p).abs(), mu)
    return masked_sum(temperature**2 * (w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)), mask)


def head_share(p: Tensor, gap: Tensor, mu: float) -> Tensor:
    """Share of the error that lies in the teacher's head.

    Args:
        p: the teacher's probabilities, [..., vocabulary].
        gap: how far the student's are from them, [..., vocabulary].
        mu: mass of the head.

    Returns:
        [...], 0 to 1; 0 without error.
    """
    import torch

    # 1 or 0 as numbers: selecting by truth values takes ten times as long
    in_head = torch.ge(p, _least_of_head(p, mu), out=torch.empty_like(p))
    return in_head.mul_(gap).sum(-1) / gap.sum(-1).clamp(min=1e-30)


def _least_of_head(p: Tensor, mu: float) -> Tensor:
    """Probability of the token with which the mass of the likeliest ones reaches mu, [..., vocabulary] -> [..., 1]."""
    if p.device.type == "cpu":
        import numpy as np
        import torch

        # values alone: sorting positions with them, as torch does, takes 20 times as long
        ascending = torch.from_numpy(np.sort(p.numpy(), axis=-1))
    else:
        ascending = p.sort(-1).values
    below = ascending.cumsum(-1)
    num_tail = (below <= below[..., -1:] - mu).sum(-1, keepdim=True)  # without them the mass is still mu
    return ascending.gather(-1, num_tail.clamp(max=p.shape[-1] - 1))
