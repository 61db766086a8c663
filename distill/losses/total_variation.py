"""Total variation distance: half the sum of the absolute differences of probability.

    loss = 1/2 * sum_v |p_v - q_v|,   p = softmax(teacher),  q = softmax(student)
    d loss / d student = 1/2 * q * (r - sum_v q_v r_v),   r = sign(q - p)

It is symmetric, between 0 and 1, and compares probabilities and not log-probabilities, so rare tokens hardly matter.
``1 - loss`` is the fraction of the student's samples that speculative decoding with this teacher accepts. Prefer it for
a draft model, or if the teacher's tail is noise. For a low perplexity prefer forward KL, because here a token with a
very small student probability has almost no gradient.

The loss is not differentiable where p_v = q_v: the gradient does not become smaller close to the optimum, so the
learning rate has to decay. It has no temperature, because its gradient scales with 1 / T and not with 1 / T^2, so the
factor T^2 would not keep its size.

Source: Wen et al. 2023, arXiv 2307.15190 (total variation distance); acceptance rate: Leviathan et al. 2022, arXiv
2211.17192.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.losses.tile import through_softmax
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class TotalVariation(LossSpec):
    """Total variation distance, half the sum of the absolute differences of probability."""

    kind: Literal["total_variation"] = "total_variation"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return total_variation(student_logits, teacher_logits, mask)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the tensors of the tile."""
        pair = tile.pair(1.0)
        gap = tile.difference(pair.q, pair.p)  # [tokens, vocabulary]
        gradient = through_softmax(tile.copy(gap).sign_().mul_(pair.q), pair.q).mul_(0.5)
        return 0.5 * gap.abs_().sum(), gradient


def total_variation(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> LossTerm:
    """Total variation distance summed over the counted tokens, without a unit.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        mask: [...], True for the positions that are counted.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, 1.0)
    return masked_sum(0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), mask)
