"""The k likeliest tokens with their log-probabilities, and the mass of all others as one further outcome.

Small and deterministic, but biased: how the tail's mass is spread is lost. Nothing is renormalised, so the student
learns the mass of the tail. Loss: KL over the k + 1 outcomes, see :mod:`distill.losses.sparse`.

Source: arXiv 2503.16870 shows what leaving the tail out does to a student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill.data.teacher_cache.base import IDS, PROBS, TAIL, CodecSpec, as_bytes, from_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TopK(CodecSpec):
    """The k likeliest tokens, the rest as one bucket; 2 k + 2 bytes and about k (log2(vocabulary / k) + 2.5) bits."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(64, ge=1)
    """Number of tokens stored per position; all of them if the vocabulary is smaller."""
    value_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the stored log-probabilities; float16 has the smaller error, float32 is exact."""

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        import torch

        top = teacher.topk(min(self.k, teacher.shape[-1]), dim=-1)  # [positions, k]
        # not 1 - sum, which has no significant digits if the top k hold nearly all of the mass
        tail = teacher.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        ids, order = top.indices.sort(-1)
        # [positions, k + 1], the tail last
        values = torch.cat([top.values.gather(-1, order), tail], -1)
        return [ids, values.to(getattr(torch, self.value_dtype))]

    def pack(self, fields: list[Tensor], width: int) -> Tensor:
        import torch

        from distill.data.teacher_cache.sorted_ids import pack_sorted

        ids, values = fields
        rising = ids + width * torch.arange(len(ids)).unsqueeze(1)
        packed = pack_sorted(rising.flatten().numpy(), len(ids) * width)
        return torch.cat([torch.from_numpy(packed), as_bytes(values)])

    def bytes_per_token(self, vocabulary: int, hidden: int) -> float:
        kept = min(self.k, vocabulary)
        value = 4 if self.value_dtype == "float32" else 2
        return value * (kept + 1) + kept * (math.log2(vocabulary / kept) + 2.5) / 8

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        import torch

        from distill.data.teacher_cache.sorted_ids import num_bytes, unpack_sorted

        kept, universe = min(self.k, width), num_positions * width
        rising = unpack_sorted(data.numpy(), num_positions * kept, universe)
        ids = torch.from_numpy(rising).view(num_positions, kept) - width * torch.arange(num_positions).unsqueeze(1)
        values = from_bytes(
            data[num_bytes(num_positions * kept, universe) :],
            getattr(torch, self.value_dtype),
            num_positions,
            kept + 1,
        )
        probs = values.float().softmax(-1)  # the k + 1 outcomes are all there is: rounding must not change their sum
        return {IDS: ids, PROBS: probs[:, :-1], TAIL: probs[:, -1]}
