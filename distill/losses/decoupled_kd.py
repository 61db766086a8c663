"""Decoupled KD: how sure of the text's next token, and how the rest is shared out, each with its own weight.

    loss = T^2 * (alpha * KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta * KL(p' || q')),   y the next token of the text,
    p = softmax(teacher / T),  q = softmax(student / T),  p'_v = p_v / (1 - p_y) for v other than y, q' likewise
    d loss / d student = T * (beta * (q' - p') - alpha * (q_y - p_y) * q'),  and at y itself T * alpha * (q_y - p_y)

Forward KL is the case alpha = 1, beta = 1 - p_y: the surer the teacher, the less of what it thinks of the other tokens
comes through. A fixed beta lets it through everywhere; prefer this with a teacher that is very sure of the text (code,
or its own training data). With beta above 1 the student learns alternatives at the cost of the right token; on noisy
text y is a weak centre and forward KL is the safer choice.

Source: Zhao et al. 2022, arXiv 2203.08679. The paper takes alpha = 1 and tunes beta between 0.5 and 8 for images; 1
here changes the size of the gradient least. T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from distill.losses.base import LossSpec, LossTerm, masked_sum, shared_log_probs
from distill.losses.schedule import NotNegative, Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows, Softmax


class DecoupledKD(LossSpec):
    """Forward KL split in two at the text's next token: its own probability, and the shares of all others."""

    needs_text: ClassVar[bool] = True

    kind: Literal["decoupled_kd"] = "decoupled_kd"
    alpha: NotNegative = 1.0
    """Weight of the divergence between the probabilities of the next token; 0 is off."""
    beta: NotNegative = 1.0
    """Weight of the divergence among the other tokens; 0 is off."""
    temperature: Positive = 1.0
    """Softens both distributions; 1 is off. The gradient is scaled by its square."""

    @model_validator(mode="after")
    def _is_on(self) -> DecoupledKD:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0: nothing is left of the loss; leave it out instead")
        return self

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        settings = {name: number(getattr(self, name)) for name in ("alpha", "beta", "temperature")}
        return decoupled_kd(student_logits, teacher_logits, targets, mask, **settings)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        alpha, beta, temperature = (number(setting) for setting in (self.alpha, self.beta, self.temperature))
        target = rows.targets.unsqueeze(-1)
        (log_q, log_q_rest, q), (log_p, log_p_rest, p) = (
            _split(rows, logits, target, temperature) for logits in rows.shared()
        )
        more = log_q.exp() - log_p.exp()  # how much likelier the student finds the target
        sure = log_p.exp() * (log_p - log_q) + log_p_rest.exp() * (log_p_rest - log_q_rest)
        among_others = rows.difference(p.log_probs, q.log_probs).mul_(p.probs).sum(-1, keepdim=True)
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
    """Both weighted divergences summed over the masked-in tokens, in nats, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; compared over the tokens that both have.
        targets: [...], ids of the next tokens, which both vocabularies have.
        mask: [...], True where a prediction counts.
        alpha: weight of the next token against all others.
        beta: weight of the others among themselves.
        temperature: divides both logits; 1 is off.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits, temperature)
    target = targets.unsqueeze(-1)
    log_q_rest, log_p_rest = _log_rest(log_q, target), _log_rest(log_p, target)
    of_target = log_p.gather(-1, target)
    sure = of_target.exp() * (of_target - log_q.gather(-1, target)) + log_p_rest.exp() * (log_p_rest - log_q_rest)
    # the target leaves p' before exp, where it would overflow when the rest is tiny
    p_others = (log_p - log_p_rest).scatter(-1, target, -math.inf).exp()
    among_others = (p_others * ((log_p - log_p_rest) - (log_q - log_q_rest))).sum(-1)
    return masked_sum(temperature**2 * (alpha * sure.squeeze(-1) + beta * among_others), mask)


def _log_rest(log_probs: Tensor, target: Tensor) -> Tensor:
    """log(1 - probability of the target), exact also where that is far below fp32's epsilon."""
    return log_probs.scatter(-1, target, -math.inf).logsumexp(-1, keepdim=True)


def _split(rows: Rows, logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Softmax]:
    """Log-probability of the target and of all others together, [rows, 1] each, and the others among themselves."""
    others = rows.softmax(rows.copy(logits).scatter_(-1, target, -math.inf), temperature)
    others.log_probs.scatter_(-1, target, 0.0)  # its share is 0, and 0 times minus infinity would be no number
    of_target = logits.gather(-1, target) / temperature
    whole = of_target.logaddexp(others.log_sum)
    return of_target - whole, others.log_sum - whole, others
