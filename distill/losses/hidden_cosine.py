"""Cosine distance: the student's hidden state learns the direction of the teacher's; its norm is free.

    loss = 1 - h . t / (|h| |t|)

per token, where h is the student's hidden state after a layer (projected if the widths differ) and t the teacher's. It
is between 0 (the same direction) and 2. Prefer it if the student's states cannot have the same norm as the teacher's,
because it is less strict than :mod:`hidden_mse <distill.losses.hidden_mse>`. But the effect of what a layer adds to the
residual stream depends on the norm of the state. So a student that was pruned from its teacher learns more from
hidden_mse.

Source: Sanh et al. 2019, arXiv 1910.01108 (DistilBERT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import masked_sum
from distill.losses.layer_losses import HiddenLossSpec
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class HiddenCosine(HiddenLossSpec):
    """One minus the cosine of hidden states, layer by layer; used in addition to a loss on logits."""

    kind: Literal["hidden_cosine"] = "hidden_cosine"

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        return hidden_cosine(student, teacher, mask)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """One minus the cosine similarity, summed over the counted tokens.

    Args:
        student: [..., channels].
        teacher: [..., channels].
        mask: [...], True for the tokens that are counted.
    """
    from torch.nn.functional import cosine_similarity

    return masked_sum(1 - cosine_similarity(student.float(), teacher.float(), dim=-1), mask)
