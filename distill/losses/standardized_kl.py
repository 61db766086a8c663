"""Forward KL of standardised logits: the student learns the teacher's order and shape, not its certainty.

    loss = T^2 * KL(p || q),   p = softmax(Z(teacher) / T),  q = softmax(Z(student) / T),
    Z(z) = (z - mean(z)) / std(z), each token
    d loss / d student = T * (q - p - Z * mean((q - p) * Z)) / std(student),   Z = Z(student)

A small student often cannot make logits as large as its teacher's; this asks only for their relations. The price: the
scale of the student's logits is free, so it is zero at any q = softmax(a * teacher) with a > 0 and calibrates nothing.
Alone it does not make a language model whose perplexity means anything: put cross_entropy (or forward_kl) beside it.
The larger the vocabulary, the flatter a standardised teacher is at the same T (its largest logit is some few standard
deviations above the mean), so T = 2, the paper's choice for 100 to 1000 classes, is too soft for a language model.

Source: Sun et al. 2024, arXiv 2403.01427 (logit standardisation), algorithm 1, with the standard deviation of
the whole population and the gradient through it; T^2 as in arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec, LossTerm
from distill.losses.forward_kl import forward_kl
from distill.losses.schedule import Positive, number

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows

_VARIANCE = 1e-6
"""Added to the variance: keeps the gradient finite where all logits are equal."""


class StandardizedKL(LossSpec):
    """Forward KL after each token's logits are brought to mean 0 and standard deviation 1, in both models."""

    kind: Literal["standardized_kl"] = "standardized_kl"
    temperature: Positive = 1.0
    """Softens both distributions after the standardising; 1 is off. The gradient is scaled by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return standardized_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        temperature = number(self.temperature)
        (student, per_std), (teacher, _) = (_standardized(rows, logits) for logits in rows.shared())
        (q, log_q, _), (p, log_p, _) = (rows.softmax(z, temperature) for z in (student, teacher))
        value = temperature**2 * rows.total(rows.difference(log_p, log_q).mul_(p)).sum()
        slope = rows.difference(q, p)
        along = (teacher.copy_(slope).mul_(student)).mean(-1, keepdim=True)
        return value, slope.addcmul_(student, along, value=-1).mul_(temperature * per_std)


def standardized_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> LossTerm:
    """KL(teacher || student) of standardised logits summed over the masked-in tokens, times temperature squared.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; standardised and compared over the tokens that both have.
        mask: [...], True where a prediction counts.
        temperature: divides both standardised logits; 1 is off.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (standardized(logits[..., :shared].float()) for logits in (student_logits, teacher_logits))
    return forward_kl(student, teacher, mask, temperature=temperature)


def standardized(logits: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dimension; equal logits, such as a new head's, become 0."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + _VARIANCE).rsqrt()


def _standardized(rows: Rows, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the block's memory, and one over the standard deviation, [rows, 1]."""
    centred = rows.difference(logits, logits.mean(-1, keepdim=True))
    per_std = (rows.total(rows.copy(centred).square_()).unsqueeze(-1) / logits.shape[-1] + _VARIANCE).rsqrt()
    return centred.mul_(per_std), per_std
