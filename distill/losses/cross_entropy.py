"""Cross-entropy with the text: the loss of ordinary training, and the control for every distillation.

    loss = -log q_y,   q = softmax(student),  y the next token
    d loss / d student = q - (1 at y, else 0)

Alone it needs no teacher. In addition to a KL it trains the student on the text itself, which helps most if the teacher
predicts this text badly.

Source: the negative log-likelihood of a language model; arXiv 1503.02531, section 2, for its use as the hard-label term
of distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.losses.base import LossSpec, masked_sum
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile


class CrossEntropy(LossSpec):
    """Negative log-likelihood of the next token of the text."""

    needs_teacher: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        return cross_entropy(student_logits, targets, mask)

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It only reads the student's distribution over its whole vocabulary."""
        probs, log_probs, _ = tile.own()
        target = tile.targets.unsqueeze(-1)  # [tokens, 1]
        gradient = tile.copy(probs)  # [tokens, student vocabulary]
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        return -log_probs.gather(-1, target).sum(), gradient


def cross_entropy(student_logits: Tensor, targets: Tensor, mask: Tensor) -> LossTerm:
    """-log q(target), summed over the counted tokens, in nats.

    Args:
        student_logits: [..., vocabulary].
        targets: [...], ids of the next tokens.
        mask: [...], True for the positions that are counted.
    """
    log_q = student_logits.float().log_softmax(-1)
    return masked_sum(-log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1), mask)
