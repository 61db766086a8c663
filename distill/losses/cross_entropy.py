"""Cross-entropy with the text itself: the loss of ordinary training, and the control of every distillation.

    loss = -log q_y,   q = softmax(student),  y the next token
    d loss / d student = q - (1 at y, else 0)

Alone it needs no teacher. Beside a divergence it ties the student to the data; it helps most where the teacher knows
the data badly.

Source: the negative log-likelihood of a language model; as the hard-label term of distillation, arXiv 1503.02531,
section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.losses.base import LossSpec, LossTerm, masked_sum

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.rows import Rows


class CrossEntropy(LossSpec):
    """Negative log-likelihood of the next token of the text."""

    needs_teacher: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        return cross_entropy(student_logits, targets, mask)

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        probs, log_probs, _ = rows.own()
        target = rows.targets.unsqueeze(-1)
        gradient = rows.copy(probs)
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        return -log_probs.gather(-1, target).sum(), gradient


def cross_entropy(student_logits: Tensor, targets: Tensor, mask: Tensor) -> LossTerm:
    """-log q(target) summed over the masked-in tokens, in nats.

    Args:
        student_logits: [..., vocabulary].
        targets: [...], ids of the next tokens.
        mask: [...], True where a prediction counts.
    """
    log_q = student_logits.float().log_softmax(-1)
    return masked_sum(-log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1), mask)
