"""Adaptive KL: a mean of forward and reverse KL, weighted per token by where student and teacher differ.

    loss = T^2 * (w * KL(p || q) + (1 - w) * KL(q || p)),   w = gap(head) / (gap(head) + gap(tail)),
    gap(S) = sum_{v in S} |p_v - q_v|,   p = softmax(teacher / T),  q = softmax(student / T),
    head = the smallest set of the teacher's most likely tokens with a total probability of at least mu; tail = the
    others
    d loss / d student = T * (w * (q - p) + (1 - w) * q * (r - sum_v q_v r_v)),   r = log q - log p

w is one number per token. It is computed in every step and treated as a constant, so no gradient flows through it (the
student could otherwise lower its loss by moving its error to the side with the smaller KL). So the gradient is not that
of the printed value, and a falling value says less about progress than with other losses: watch ``kl`` instead.

Forward KL first corrects the head of a distribution, and reverse KL its tail. This loss is meant for short runs, in
which neither of them converges. In long runs both have the same optimum, and forward KL is cheaper, because this loss
sorts the vocabulary. Tokens that are exactly as likely as the least likely token of the head belong to the head too.

Source: Wu et al. 2024, arXiv 2404.02657, which also uses mu = 0.5. Here the token with which the cumulative probability
reaches mu belongs to the head, as in the paper's definition of the smallest set; the authors' code counts it to the
tail unless it is the first token. For T^2 see arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.losses.schedule import Fraction, Positive, number
from distill.losses.tile import through_softmax
from distill.numerics.kl import kl, kl_summands
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class AdaptiveKL(LossSpec):
    """A mean of forward and reverse KL per token: more forward KL if the error is in likely tokens."""

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Fraction = 0.5
    """Total probability of the head (the most likely tokens) of the teacher's distribution, between 0 and 1 (both
    excluded)."""
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        mu, temperature = number(self.mu), number(self.temperature)
        return adaptive_kl(student_logits, teacher_logits, mask, mu=mu, temperature=temperature)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        mu, temperature = number(self.mu), number(self.temperature)
        pair = tile.pair(temperature)
        gap = tile.difference(pair.q, pair.p)  # [tokens, vocabulary]
        with tile.borrow(gap) as distance:
            w = head_share(pair.p, distance.copy_(gap).abs_(), mu)  # [tokens]
        slope = kl_summands(pair.log_q, pair.log_p, pair.q, out=tile.take(pair.q))  # [tokens, vocabulary]
        value = temperature**2 * (w * tile.forward_kl(temperature) + (1 - w) * slope.sum(-1)).sum()
        w = w.unsqueeze(-1)  # [tokens, 1]
        # slope + w (gap - slope): gap is the gradient of forward KL, slope (after the softmax) that of reverse KL
        return value, through_softmax(slope, pair.q).lerp_(gap, w).mul_(temperature)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, mu: float = 0.5, temperature: float = 1.0
) -> LossTerm:
    """The weighted mean of both KLs times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
        mu: total probability of the head (the most likely tokens) of the teacher's distribution, 0 < mu < 1.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    p = log_p.exp()
    w = head_share(p, (log_q.detach().exp() - p).abs(), mu)
    return masked_sum(temperature**2 * (w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)), mask)


def head_share(p: Tensor, gap: Tensor, mu: float) -> Tensor:
    """Fraction of the total difference that is in the head (the most likely tokens) of the teacher's distribution.

    Args:
        p: the teacher's probabilities, [..., vocabulary].
        gap: absolute difference between the student's and the teacher's probabilities, [..., vocabulary].
        mu: total probability of the head.

    Returns:
        [...], between 0 and 1; 0 if there is no difference.
    """
    import torch

    # 1.0 or 0.0, [..., vocabulary]: indexing with a boolean mask takes ten times as long
    in_head = torch.ge(p, _least_of_head(p, mu), out=torch.empty_like(p))
    return in_head.mul_(gap).sum(-1) / gap.sum(-1).clamp(min=1e-30)


def _least_of_head(p: Tensor, mu: float) -> Tensor:
    """Probability of the least likely token of the head, [..., vocabulary] -> [..., 1]."""
    if p.device.type == "cpu":
        import numpy as np
        import torch

        # np.sort sorts only values; torch.sort also returns indices and takes 20 times as long
        ascending = torch.from_numpy(np.sort(p.numpy(), axis=-1))
    else:
        ascending = p.sort(-1).values
    below = ascending.cumsum(-1)  # probability of a token and of all less likely tokens, [..., vocabulary]
    # tokens of the tail: the remaining tokens still have a total probability of at least mu
    num_tail = (below <= below[..., -1:] - mu).sum(-1, keepdim=True)
    return ascending.gather(-1, num_tail.clamp(max=p.shape[-1] - 1))
