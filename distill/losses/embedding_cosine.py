"""Cosine distance of sentence embeddings: the student's vector gets the direction of the teacher's.

    loss = 1 - s . t / (|s| |t|) = | s / |s| - t / |t| |^2 / 2

per text, where s and t are the embeddings of student and teacher. The second form has no cancellation near agreement.
sentence-transformers averages the squared distance over the channels: that loss is 2 / channels times this one, so
weight decay and clipping would dominate it. Use it with task: embedding. Both embeddings must have the same width.

Source: Reimers & Gurevych 2020, arXiv 2004.09813 (a student that imitates a teacher's sentence embeddings).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.errors import InputError
from distill.losses.base import LossSpec, masked_sum
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class EmbeddingCosine(LossSpec):
    """One minus the cosine of the two models' embeddings of a text; for task: embedding."""

    compares: ClassVar[Literal["distributions", "values"]] = "values"

    kind: Literal["embedding_cosine"] = "embedding_cosine"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return embedding_cosine(student_logits, teacher_logits, mask)


def embedding_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """One minus the cosine, summed over the texts.

    Args:
        student: [..., channels].
        teacher: [..., channels].
        mask: [...], True for the texts that are counted.

    Raises:
        InputError: the embeddings differ in width.
    """
    from torch.nn.functional import normalize

    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"embedding_cosine: the student's embeddings have {student.shape[-1]} channels, the teacher's "
            f"{teacher.shape[-1]}; use a student with the teacher's hidden size"
        )
    difference = normalize(student.float(), dim=-1) - normalize(teacher.float(), dim=-1)  # [..., channels]
    return masked_sum(difference.square().sum(-1) / 2, mask)
