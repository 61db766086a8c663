"""Decoupled KD: separate weights for the probability of the next token, and for the distribution over all others.

    loss = T^2 * (alpha * KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta * KL(p' || q')),   y the next token of the text,
    p = softmax(teacher / T),  q = softmax(student / T),  p'_v = p_v / (1 - p_y) for v other than y, q' likewise
    d loss / d student = T * (beta * (q' - p') - alpha * (q_y - p_y) * q'),  and at y itself T * alpha * (q_y - p_y)

Forward KL is the case alpha = 1 and beta = 1 - p_y: the more confident the teacher, the less the student learns from
the other probabilities. A fixed beta keeps their weight. Prefer this loss if the teacher is very confident on the text
(code, or its own training data). With beta above 1 the student learns the alternatives at the expense of the next
token. On noisy text y is often a poor choice, and forward KL is safer.

Source: Zhao et al. 2022, arXiv 2203.08679. The paper uses alpha = 1 and a beta between 0.5 and 8 for images; the
default of 1 changes the size of the gradient least. For T^2 see arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from distill.losses.base import LossSpec, masked_sum, shared_log_probs
from distill.losses.schedule import NotNegative, Positive, number
from distill.numerics.kl import kl, kl_summands
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile, Softmax


class DecoupledKD(LossSpec):
    """Forward KL in two parts: the probability of the text's next token, and the distribution over all other tokens."""

    needs_text: ClassVar[bool] = True

    kind: Literal["decoupled_kd"] = "decoupled_kd"
    alpha: NotNegative = 1.0
    """Weight of the KL between the probabilities of the next token (next token or any other); 0 is off."""
    beta: NotNegative = 1.0
    """Weight of the KL between the distributions over all other tokens; 0 is off."""
    temperature: Positive = 1.0
    """Softmax temperature of both models; 1 is off. The loss is multiplied by its square."""

    @model_validator(mode="after")
    def _is_on(self) -> DecoupledKD:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, so the loss is always 0; remove it")
        return self

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        settings = {name: number(getattr(self, name)) for name in ("alpha", "beta", "temperature")}
        return decoupled_kd(student_logits, teacher_logits, targets, mask, **settings)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It reads the logits of the tile, and copies them without the target."""
        alpha, beta, temperature = (number(setting) for setting in (self.alpha, self.beta, self.temperature))
        target = tile.targets.unsqueeze(-1)  # [tokens, 1]
        # log-probabilities of the target and of all others, [tokens, 1] each, and the distribution over the others
        (log_q, log_q_rest, q), (log_p, log_p_rest, p) = (
            _split(tile, logits, target, temperature) for logits in tile.shared()
        )
        more = log_q.exp() - log_p.exp()  # q_y - p_y, [tokens, 1]
        sure = kl_summands(log_p, log_q) + kl_summands(log_p_rest, log_q_rest)  # [tokens, 1]
        with tile.borrow(p.probs) as scratch:
            among_others = kl(p.log_probs, q.log_probs, p.probs, out=scratch).unsqueeze(-1)  # [tokens, 1]
        gradient = q.probs.mul_(beta - alpha * more).sub_(p.probs, alpha=beta).scatter_(-1, target, alpha * more)
        return temperature**2 * (alpha * sure + beta * among_others).sum(), gradient.mul_(temperature)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> LossTerm:
    """The weighted sum of both KLs times temperature squared, summed over the counted tokens, in nats.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; the models are compared over the vocabulary that both have.
        targets: [...], ids of the next tokens, which must be in both vocabularies.
        mask: [...], True for the positions that are counted.
        alpha: weight of the KL between the probabilities of the next token.
        beta: weight of the KL between the distributions over all other tokens.
        temperature: divisor of both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    target = targets.unsqueeze(-1)
    log_q_rest, log_p_rest = _log_rest(log_q, target), _log_rest(log_p, target)
    sure = kl_summands(log_p.gather(-1, target), log_q.gather(-1, target)) + kl_summands(log_p_rest, log_q_rest)
    # the target is removed before exp, which would overflow if the other probabilities are tiny
    p_others = (log_p - log_p_rest).scatter(-1, target, -math.inf).exp()  # [..., vocabulary], 0 at the target
    among_others = kl(log_p - log_p_rest, log_q - log_q_rest, p_others)
    return masked_sum(temperature**2 * (alpha * sure.squeeze(-1) + beta * among_others), mask)


def _log_rest(log_probs: Tensor, target: Tensor) -> Tensor:
    """log(1 - probability of the target), accurate even if the result is far below the epsilon of fp32."""
    return log_probs.scatter(-1, target, -math.inf).logsumexp(-1, keepdim=True)


def _split(tile: LogitTile, logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Softmax]:
    """Log-probability of the target and of all others together, [tokens, 1] each, and the distribution over the others.

    The distribution is in memory of the calling loss.
    """
    others = tile.softmax(tile.copy(logits).scatter_(-1, target, -math.inf), temperature)
    others.log_probs.scatter_(-1, target, 0.0)  # its probability is 0, and 0 * -inf would be NaN
    of_target = logits.gather(-1, target) / temperature
    whole = of_target.logaddexp(others.log_sum)
    return of_target - whole, others.log_sum - whole, others
