"""Total variation: how much probability lies on the wrong tokens.

    loss = 1/2 * sum_v |p_v - q_v|,   p = softmax(teacher),  q = softmax(student)
    d loss / d student = 1/2 * q * (r - sum_v q_v r_v),   r = sign(q - p)

It is symmetric, from 0 to 1, and counts differences of probability, not of log-probability: rare tokens hardly matter,
and 1 - loss is the share of a student's samples that speculative decoding with this teacher accepts. Prefer it for a
draft model, or where the teacher's tail is noise; for perplexity prefer forward KL, as a token that the student has
ruled out gives next to no gradient here.

It has a kink at agreement: the gradient does not shrink on the way there, it jumps (0 at equality itself), so the
learning rate has to fall to the end. It has no temperature, because T^2 would not hold its gradient's size: that falls
with 1 / T, not 1 / T^2.

Source: Wen et al. 2023, arXiv 2307.15190 (total variation distance); acceptance rate: Leviathan et al. 2022, arXiv
2211.17192.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm, masked_sum, shared_log_probs
from distill.losses.rows import through_softmax

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class TotalVariation(LossSpec):
    """Total variation distance, half the sum of absolute differences of probability."""

    kind: Literal["total_variation"] = "total_variation"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return total_variation(student_logits, teacher_logits, mask)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        pair = rows.pair(1.0)
        gap = rows.difference(pair.q, pair.p)
        gradient = through_softmax(rows.copy(gap).sign_().mul_(pair.q), pair.q).mul_(0.5)
        return 0.5 * gap.abs_().sum(), gradient


def total_variation(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> LossTerm:
    """Total variation summed over the masked-in tokens; a probability of each token, not nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        mask: [...], True where a prediction counts.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, 1.0)
    return masked_sum(0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), mask)
