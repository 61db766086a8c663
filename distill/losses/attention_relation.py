"""Relations of MiniLMv2: which tokens the student's queries, keys and values find alike is as in the teacher.

    R_i = softmax_j(a_i . a_j / sqrt(d)),  j <= i;    loss = KL(R_i of the teacher || R_i of the student)

of each token i, where a are the queries of all heads side by side, cut anew into ``num_relation_heads`` vectors of d
channels; likewise the keys and the values, and the loss is the mean over relation heads and over the three. In place of
states only their mutual likeness is compared, so neither widths nor numbers of heads need to agree and nothing is
projected. Prefer it where student and teacher are of different widths or families; a student cut out of its teacher can
be told more, and at less cost, by :mod:`hidden_mse <distill.losses.hidden_mse>`.

As j runs over what a decoder may see, the rows are causal; tokens that do not count are left out on both sides. The
vectors are those of the linear projections, before rotary positions. Memory is O(chunk of rows x tokens): rows are
computed again in the backward pass.

Source: Wang et al. 2020, arXiv 2012.15828 (which adds the three up, in encoders, from one layer: the last, or one above
the middle of a large teacher); the values' relation first in arXiv 2002.10957.
"""

from __future__ import annotations

from math import gcd, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from distill.core.errors import InputError
from distill.losses.base import LossTerm, kl, masked_sum
from distill.losses.states import Layers, Shape, StateLossSpec

if TYPE_CHECKING:
    from torch import Tensor


class AttentionRelation(StateLossSpec):
    """KL between relations among tokens of queries, keys and values (MiniLMv2); beside a loss on the logits."""

    parts: ClassVar[tuple[str, ...]] = ("queries", "keys", "values")

    kind: Literal["attention_relation"] = "attention_relation"
    layers: Layers = "last"
    """Which of the student's layers learn from which of the teacher's, from 0: last only the last (the paper's), auto
    every one (the pruning's own map, else evenly), [[5, 20]] is by hand."""
    num_relation_heads: int | None = Field(None, ge=1)
    """Vectors that the heads of one token are cut into; unset: as many as divide both models' numbers of heads (for
    keys and values of KV heads)."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, documents: Tensor | None = None) -> LossTerm:
        heads = self.num_relation_heads or 1
        return attention_relation(student, teacher, mask, documents, num_relation_heads=heads)

    def between(self, student: Shape, teacher: Shape) -> Self:
        """This loss with its number of relation heads settled.

        Raises:
            InputError: the number does not divide a width.
        """
        found = self.num_relation_heads or gcd(student[0], teacher[0])
        for who, (heads, channels) in (("student", student), ("teacher", teacher)):
            if heads * channels % found:
                raise InputError(
                    f"{self.kind}.num_relation_heads ({found}) must divide the {who}'s {heads * channels} channels "
                    f"({heads} heads of {channels}); leave it unset for the most that fit both models' heads"
                )
        return self.model_copy(update={"num_relation_heads": found})


def attention_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    documents: Tensor | None = None,
    *,
    num_relation_heads: int,
    chunk_entries: int = 1 << 23,
) -> LossTerm:
    """KL(teacher || student) of the tokens' causal relations, mean over relation heads, summed over tokens, in nats.

    Args:
        student: vectors of all heads side by side, [batch, sequence, student width].
        teacher: the same, [batch, sequence, teacher width].
        mask: [batch, sequence]; False neither has a row nor stands in another's.
        documents: [batch, sequence], number of each token's document, whose tokens alone it sees; None is one a row.
        num_relation_heads: vectors that a width is cut into; divides both.
        chunk_entries: entries of a relation that exist at once, but at least one row of every sequence.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def apart(vectors: Tensor) -> Tensor:
        return vectors.float().unflatten(-1, (num_relation_heads, -1)).transpose(1, 2)

    batch, length = mask.shape
    rows = max(1, chunk_entries // (batch * num_relation_heads * length))
    ours, theirs = apart(student), apart(teacher)
    with torch.autocast(student.device.type, enabled=False):  # half precision is too coarse for what is exponentiated
        values = [
            checkpoint(_rows, ours, theirs, mask, documents, start, min(start + rows, length), **_ONCE_MORE)
            for start in range(0, length, rows)
        ]
    return masked_sum(torch.cat(values, 1), mask)


_ONCE_MORE: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""How rows are computed again in the backward pass: nothing in them is random."""


def _rows(student: Tensor, teacher: Tensor, mask: Tensor, documents: Tensor | None, start: int, end: int) -> Tensor:
    """KL of the rows ``start`` to ``end``, mean over heads: [batch, heads, sequence, channels] -> [batch, rows]."""
    import torch

    at = torch.arange(end, device=mask.device)
    row = at[start:].unsqueeze(1)
    seen = (at < row) & mask[:, :end].unsqueeze(1)
    if documents is not None:
        seen = seen & (documents[:, :end].unsqueeze(1) == documents[:, start:end].unsqueeze(2))
    unseen = ~(seen | (at == row)).unsqueeze(1)  # a token always sees itself, so that no row is empty

    def relation(vectors: Tensor) -> Tensor:
        scores = vectors[:, :, start:end] @ vectors[:, :, :end].transpose(2, 3) / sqrt(vectors.shape[-1])
        return scores.masked_fill(unseen, -1e30).log_softmax(-1)  # finite, so that 0 * log 0 is 0

    return kl(relation(teacher), relation(student)).mean(1)
