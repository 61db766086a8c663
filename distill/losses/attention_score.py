"""Attention scores before the softmax, head by head: the student attends as its teacher does (TinyBERT).

    s_hij  = q_hi . k_hj / sqrt(d)
    loss_i = mean over heads h and tokens j of  (s_hij of the student - s_hij of the teacher)^2

per token i, over the tokens j to which the model attends. Both models must have the same number of heads, which may
differ in channels. With grouped queries, each query head is compared with the key that it reads.
:mod:`attention_relation <distill.losses.attention_relation>` has no such condition, and reads values too; prefer it
unless only layers of the student were removed. The scores are computed from the outputs of the linear projections,
before rotary position embeddings, so that the loss does not depend on how attention is computed.

Source: Jiao et al. 2019, arXiv 1909.10351 (equation 7). Their code sets scores of padding to 0; here padding is left
out.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PrivateAttr

from distill.core.errors import InputError
from distill.losses.base import masked_sum
from distill.losses.layer_losses import Shape, StateLossSpec
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class AttentionScore(StateLossSpec):
    """Mean squared difference of attention scores, layer by layer; used in addition to a loss on logits."""

    parts: ClassVar[tuple[str, ...]] = ("queries", "keys")
    is_joint: ClassVar[bool] = True

    kind: Literal["attention_score"] = "attention_score"
    _heads: int = PrivateAttr(1)
    _channels: tuple[int, int] | None = PrivateAttr(None)

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        return attention_score(
            student,
            teacher,
            mask,
            documents,
            num_heads=self._heads,
            channels_per_head=self._channels,
            is_causal=is_causal,
        )

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
        settled._heads, settled._channels = student[0], (student[1], teacher[1])
        return settled


def attention_score(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    documents: Tensor | None = None,
    *,
    num_heads: int,
    channels_per_head: tuple[int, int] | None = None,
    is_causal: bool = True,
) -> LossTerm:
    """Squared difference of attention scores, averaged over heads and attended tokens, summed over tokens.

    Args:
        student: queries and then keys of all heads, [batch, sequence, width of queries + width of keys].
        teacher: the same of the teacher.
        mask: [batch, sequence], False for tokens that are excluded; or a weight per token, where 0 excludes the token.
        documents: [batch, sequence], index of each token's document, to which attention is limited; None if each row is
            one document.
        num_heads: query heads of both models.
        channels_per_head: of the student and of the teacher; None: there are as many key heads as query heads.
        is_causal: whether a token attends to itself and earlier tokens only.
    """
    import torch

    def scores(states: Tensor, channels: int) -> Tensor:
        """[batch, heads, sequence, sequence]."""
        heads = states.float().unflatten(-1, (-1, channels)).transpose(1, 2)
        queries, keys = heads[:, :num_heads], heads[:, num_heads:]  # [batch, heads, sequence, channels]
        keys = keys.repeat_interleave(num_heads // keys.shape[1], dim=1)  # consecutive query heads share a key head
        return queries @ keys.transpose(2, 3) / sqrt(channels)

    ours, theirs = channels_per_head or (states.shape[-1] // (2 * num_heads) for states in (student, teacher))
    length, counted = mask.shape[1], mask.bool()
    seen = counted.unsqueeze(1).expand(-1, length, -1)  # [batch, sequence, sequence]
    if is_causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if documents is not None:
        seen = seen & (documents.unsqueeze(1) == documents.unsqueeze(2))
    with torch.autocast(student.device.type, enabled=False):
        difference = (scores(student, ours) - scores(teacher, theirs)).square().mean(1)  # [batch, sequence, sequence]
    values = difference.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
    return masked_sum(values, mask)
