"""Attention scores before the softmax, head by head: the student attends as its teacher does (TinyBERT).

    s_hij  = q_hi . k_hj / sqrt(d)
    loss_i = mean over heads h and tokens j of  (s_hij of the student - s_hij of the teacher)^2

per token i, over the tokens j to which the model attends. Both models must have the same number of heads, which may
differ in channels. :mod:`attention_relation <distill.losses.attention_relation>` has no such condition, and reads
values too; prefer it unless the student was cut in depth alone. The scores are computed from the outputs of the linear
projections, before rotary position embeddings, so that the loss does not depend on how attention is computed.

Source: Jiao et al. 2019, arXiv 1909.10351 (equation 7). Their code sets scores of padding to 0; here padding is left
out.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PrivateAttr

from distill.core.errors import InputError
from distill.losses.base import masked_sum
from distill.losses.states import Shape, StateLossSpec
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class AttentionScore(StateLossSpec):
    """Mean squared difference of attention scores, layer by layer; used in addition to a loss on logits."""

    parts: ClassVar[tuple[str, ...]] = ("queries", "keys")
    is_joint: ClassVar[bool] = True

    kind: Literal["attention_score"] = "attention_score"
    _heads: int = PrivateAttr(1)

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        return attention_score(student, teacher, mask, documents, num_heads=self._heads, is_causal=is_causal)

    def between(self, student: Shape, teacher: Shape) -> Self:
        """A copy of this loss that knows the number of heads.

        Raises:
            InputError: the models differ in it.
        """
        if student[0] != teacher[0]:
            raise InputError(
                f"{self.kind}: the student has {student[0]} heads for queries or keys and the teacher {teacher[0]}; "
                "use attention_relation, which compares models with different heads"
            )
        settled = self.model_copy()
        settled._heads = student[0]
        return settled


def attention_score(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    documents: Tensor | None = None,
    *,
    num_heads: int,
    is_causal: bool = True,
) -> LossTerm:
    """Squared difference of attention scores, averaged over heads and attended tokens, summed over tokens.

    Args:
        student: queries and then keys of all heads, [batch, sequence, 2 x student width].
        teacher: the same of the teacher, [batch, sequence, 2 x teacher width].
        mask: [batch, sequence], False for tokens that are excluded; or weights of the tokens, 0 for those.
        documents: [batch, sequence], index of each token's document, to which attention is limited; None if each row is
            one document.
        num_heads: of both models.
        is_causal: whether a token attends to itself and earlier tokens only.
    """
    import torch

    def scores(states: Tensor) -> Tensor:
        """[batch, heads, sequence, sequence]."""
        queries, keys = (
            half.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for half in states.chunk(2, dim=-1)
        )  # [batch, heads, sequence, channels]
        return queries @ keys.transpose(2, 3) / sqrt(queries.shape[-1])

    length, counted = mask.shape[1], mask.bool()
    seen = counted.unsqueeze(1).expand(-1, length, -1)  # [batch, sequence, sequence]
    if is_causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if documents is not None:
        seen = seen & (documents.unsqueeze(1) == documents.unsqueeze(2))
    with torch.autocast(student.device.type, enabled=False):
        difference = (scores(student) - scores(teacher)).square().mean(1)  # [batch, sequence, sequence]
    values = difference.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
    return masked_sum(values, mask)
