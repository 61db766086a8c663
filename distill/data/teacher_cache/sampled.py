"""Tokens drawn from the teacher's distribution with their counts: unbiased, and the smallest of the codecs.

Each position keeps ``draws`` ids drawn with replacement; their counts over ``draws`` have the teacher's probabilities
as expected value, so value and gradient of forward KL are right on average, the tail included, at about a dozen
different ids a token. The noise shrinks with the batch and with ``draws``. The exact entropy is kept beside them, so
that the logged KL is one. A position has the same draws in every epoch.

Source: Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, with the teacher's own
distribution as the proposal (importance weights of 1), which needs no weights but the counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill.data.teacher_cache.base import (
    ENTROPY,
    IDS,
    PROBS,
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


class Sampled(CodecSpec):
    """Ids drawn from the teacher with their counts, an unbiased estimate; 3 bytes + 3 (or 4) each different id."""

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(50, ge=1, le=255)
    """Draws a position; the variance falls as 1 / draws, the bytes rise more slowly as ids repeat."""

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        import torch

        positions, vocabulary = teacher.shape
        probs = teacher.exp()
        drawn = probs.multinomial(self.draws, replacement=True, generator=generator)
        rows = torch.arange(positions, device=teacher.device).unsqueeze(1)
        found, counts = torch.unique(rows * vocabulary + drawn, return_counts=True)  # sorted by position, then id
        different = torch.bincount(found // vocabulary, minlength=positions)
        entropy = -torch.special.xlogy(probs, probs).sum(-1)
        return [
            as_bytes(different.to(torch.uint8)),
            as_bytes(entropy.to(torch.float16)),
            pack_ids(found % vocabulary, vocabulary),
            as_bytes(counts.to(torch.uint8)),
        ]

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        import torch

        of_ids = id_bytes(width)
        different = data[:num_positions].long()
        entropy = from_bytes(data[num_positions : 3 * num_positions], torch.float16, num_positions).float()
        total, start = int(different.sum()), 3 * num_positions
        there = torch.arange(int(different.max())) < different.unsqueeze(1)
        ids, weights = torch.zeros(there.shape, dtype=torch.int64), torch.zeros(there.shape)
        ids[there] = unpack_ids(data[start : start + total * of_ids].view(total, of_ids))
        weights[there] = data[start + total * of_ids :].float() / self.draws
        return {IDS: ids, PROBS: weights, ENTROPY: entropy}
