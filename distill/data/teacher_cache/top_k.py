"""The k likeliest tokens with their log-probabilities, and the mass of all others as one outcome more.

Small and without chance, but not unbiased: how the tail's mass is spread is lost. Nothing is renormalised, so the
student learns how much lies in the tail. Loss: KL over the k + 1 outcomes, see :mod:`distill.losses.sparse`.

Source: arXiv 2503.16870 shows what leaving the tail out does to a student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill.data.teacher_cache.base import (
    IDS,
    PROBS,
    TAIL,
    CodecSpec,
    as_bytes,
    from_bytes,
    id_bytes,
    pack_ids,
    unpack_ids,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TopK(CodecSpec):
    """The k likeliest tokens, the rest as one bucket; 4 k + 2 bytes a token (5 k + 2 from 65,537 tokens on)."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(64, ge=1)
    """Tokens kept; all of them when the vocabulary is smaller."""
    value_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored log-probabilities; float16 has the smaller error, float32 is exact."""

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        import torch

        top = teacher.topk(min(self.k, teacher.shape[-1]), dim=-1)
        # not 1 - sum, which has no digits left when the head is sure
        tail = teacher.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        values = torch.cat([top.values, tail], -1).to(getattr(torch, self.value_dtype))
        return [pack_ids(top.indices, teacher.shape[-1]), as_bytes(values)]

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        import torch

        kept, of_ids = min(self.k, width), id_bytes(width)
        split = num_positions * kept * of_ids
        values = from_bytes(data[split:], getattr(torch, self.value_dtype), num_positions, kept + 1)
        probs = values.float().softmax(-1)  # the k + 1 outcomes are all there is: rounding must not change their sum
        ids = unpack_ids(data[:split].view(num_positions, kept, of_ids))
        return {IDS: ids, PROBS: probs[:, :-1], TAIL: probs[:, -1]}
