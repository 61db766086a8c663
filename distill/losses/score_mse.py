"""Squared error between the scores of student and teacher, for task: regression.

    loss = (s - t)^2

per text, where s is the student's score and t the teacher's. TinyBERT trains regression on the labels alone
(:mod:`label_mse <distill.losses.label_mse>`); a teacher's score is less noisy where labels are few.

Source: Ba & Caruana 2014, arXiv 1312.6184 (regression on a teacher's outputs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.losses.base import LossSpec, masked_sum
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class ScoreMSE(LossSpec):
    """Squared difference from the teacher's score; for task: regression."""

    compares: ClassVar[Literal["distributions", "values"]] = "values"

    kind: Literal["score_mse"] = "score_mse"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return score_mse(student_logits, teacher_logits, mask)


def score_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """Squared difference, summed over the texts.

    Args:
        student: scores, [..., 1].
        teacher: scores, [..., 1].
        mask: [...], True for the texts that are counted.
    """
    return masked_sum((student[..., 0].float() - teacher[..., 0].float()).square(), mask)
