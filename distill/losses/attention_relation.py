"""Attention relations of MiniLMv2: the student learns the similarities between the tokens' queries, keys and values.

    R_i = softmax_j(a_i . a_j / sqrt(d));    loss = KL(R_i of the teacher || R_i of the student)

per token i, where a are the concatenated queries of all heads, split again into ``num_relation_heads`` vectors of d
channels. The same is computed for keys and values, and the loss is the mean over relation heads and over the three.
Similarities between tokens are compared and not the states themselves, so student and teacher may differ in width and
number of heads, and no projection is needed. Prefer it if they differ in width or architecture. A student that was
pruned from its teacher learns more, at less cost, from :mod:`hidden_mse <distill.losses.hidden_mse>`.

The sum over j is over the tokens to which the model attends: j <= i in a decoder, all of the row in an encoder. Tokens
that are not counted are excluded both as i and as j. The vectors are the outputs of the linear projections, before
rotary position embeddings. The memory is O(tokens per chunk x tokens), because the relations are recomputed in the
backward pass.

Source: Wang et al. 2020, arXiv 2012.15828 (for encoders, with the sum over the three, from one layer: the last layer,
or one above the middle of a large teacher); the relation of values is from arXiv 2002.10957.
"""

from __future__ import annotations

from math import gcd, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from distill.core.errors import InputError
from distill.losses.base import masked_sum
from distill.losses.layer_losses import Layers, Shape, StateLossSpec
from distill.numerics.kl import kl
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class AttentionRelation(StateLossSpec):
    """KL between attention relations (MiniLMv2), layer by layer; used in addition to a loss on logits."""

    parts: ClassVar[tuple[str, ...]] = ("queries", "keys", "values")

    kind: Literal["attention_relation"] = "attention_relation"
    layers: Layers = "last"
    """Pairs of a student layer and a teacher layer that are compared, counted from 0. last: only the last layers, as in
    the paper; auto: all layers of the student, paired with the teacher layers from which pruning copied them, or else
    evenly; [[5, 20]]: these pairs."""
    num_relation_heads: int | None = Field(None, ge=1)
    """Number of vectors into which the heads of a token are split; unset: the greatest common divisor of the numbers of
    heads of both models (of KV heads for keys and values)."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        heads = self.num_relation_heads or 1
        return attention_relation(student, teacher, mask, documents, num_relation_heads=heads, is_causal=is_causal)

    def between(self, student: Shape, teacher: Shape) -> Self:
        """A copy of this loss with its number of relation heads resolved.

        Raises:
            InputError: the number does not divide a width.
        """
        found = self.num_relation_heads or gcd(student[0], teacher[0])
        for who, (heads, channels) in (("student", student), ("teacher", teacher)):
            if heads * channels % found:
                raise InputError(
                    f"{self.kind}.num_relation_heads ({found}) must divide the {who}'s {heads * channels} channels "
                    f"({heads} heads of {channels}); leave it unset to "
                    "use the largest number that divides both models' heads"
                )
        return self.model_copy(update={"num_relation_heads": found})


def attention_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    documents: Tensor | None = None,
    *,
    num_relation_heads: int,
    is_causal: bool = True,
    chunk_entries: int = 1 << 23,
) -> LossTerm:
    """KL(teacher || student) of relations, averaged over relation heads and summed over tokens, in nats.

    Args:
        student: concatenated vectors of all heads, [batch, sequence, student width].
        teacher: concatenated vectors of all heads, [batch, sequence, teacher width].
        mask: [batch, sequence], False for tokens that are excluded from all relations; or a weight per token, where 0
            excludes the token.
        documents: [batch, sequence], index of each token's document, to which its relations are limited; None if each
            row is one document.
        num_relation_heads: number of vectors into which a width is split; it must divide both widths.
        is_causal: whether a token is related to itself and earlier tokens only, or to all tokens of its row.
        chunk_entries: number of entries of the relations that exist at once; at least one token per sequence is
            computed.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def split(vectors: Tensor) -> Tensor:
        """[batch, sequence, width] -> [batch, relation heads, sequence, channels]."""
        return vectors.float().unflatten(-1, (num_relation_heads, -1)).transpose(1, 2)

    (batch, length), counted = mask.shape, mask.bool()
    tokens = max(1, chunk_entries // (batch * num_relation_heads * length))
    ours, theirs = split(student), split(teacher)
    with torch.autocast(student.device.type, enabled=False):  # bf16 and fp16 are too coarse for the inputs of a softmax
        values = [  # [batch, tokens of a chunk] each
            checkpoint(
                _relation_kl,
                ours,
                theirs,
                counted,
                documents,
                start,
                min(start + tokens, length),
                is_causal,
                **_RECOMPUTED,
            )
            for start in range(0, length, tokens)
        ]
    return masked_sum(torch.cat(values, 1), mask)


_RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""Arguments of :func:`torch.utils.checkpoint.checkpoint`: the relations contain nothing random."""


def _relation_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    documents: Tensor | None,
    start: int,
    end: int,
    is_causal: bool,
) -> Tensor:
    """KL of the relations of tokens ``start`` to ``end``, averaged over relation heads.

    Args:
        student: [batch, relation heads, sequence, channels].
        teacher: [batch, relation heads, sequence, channels].
        mask: [batch, sequence].
        documents: [batch, sequence] or None.
        start: index of the first token.
        end: index after the last token.
        is_causal: whether later tokens are excluded.

    Returns:
        [batch, end - start], nats.
    """
    import torch

    last = end if is_causal else mask.shape[1]  # after the last token that any of these is related to
    at = torch.arange(last, device=mask.device)  # [last]
    row = at[start:end].unsqueeze(1)  # [tokens, 1]
    earlier = at < row if is_causal else torch.ones(len(row), last, dtype=torch.bool, device=mask.device)
    seen = earlier & mask[:, :last].unsqueeze(1)  # [batch, tokens, last]
    if documents is not None:
        seen = seen & (documents[:, :last].unsqueeze(1) == documents[:, start:end].unsqueeze(2))
    unseen = ~(seen | (at == row)).unsqueeze(1)  # [batch, 1, tokens, last]; a token always attends to itself

    def relation(vectors: Tensor) -> Tensor:
        """Log-softmax of the similarities, [batch, relation heads, tokens, last]."""
        scores = vectors[:, :, start:end] @ vectors[:, :, :last].transpose(2, 3) / sqrt(vectors.shape[-1])
        return scores.masked_fill(unseen, -1e30).log_softmax(-1)  # finite, so that 0 * log 0 is 0

    return kl(relation(teacher), relation(student)).mean(1)
