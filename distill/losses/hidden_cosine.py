"""Cosine between hidden states: the student's state points where the teacher's does, at whatever length.

    loss = 1 - h . t / (|h| |t|)

of each token, where h is the student's hidden state after a layer (projected where it is narrower) and t the teacher's.
From 0 (the same direction) to 2. Prefer it where the student's states cannot have the teacher's length: it asks for
less than :mod:`hidden_mse <distill.losses.hidden_mse>`. But what a layer adds to the stream of states is measured
against that length, so a student cut out of its teacher learns more exactly from hidden_mse.

Source: Sanh et al. 2019, arXiv 1910.01108 (DistilBERT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossTerm, masked_sum
from distill.losses.states import HiddenLossSpec

if TYPE_CHECKING:
    from torch import Tensor


class HiddenCosine(HiddenLossSpec):
    """One minus the cosine of hidden states, layer by layer; beside a loss on the logits."""

    kind: Literal["hidden_cosine"] = "hidden_cosine"

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, documents: Tensor | None = None) -> LossTerm:
        return hidden_cosine(student, teacher, mask)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """One minus the cosine, summed over the masked-in tokens.

    Args:
        student: [..., channels].
        teacher: [..., channels].
        mask: [...], True where a token counts.
    """
    from torch.nn.functional import cosine_similarity

    return masked_sum(1 - cosine_similarity(student.float(), teacher.float(), dim=-1), mask)
