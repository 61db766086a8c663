"""Tokens drawn from the teacher's distribution with their counts: unbiased, and the smallest of the codecs.

For each position, ``draws`` ids are drawn with replacement. The expected value of count / draws is the teacher's
probability, so value and gradient of forward KL are unbiased, including the tail, with about a dozen different ids per
token. The noise decreases with the batch size and with ``draws``. The exact entropy is stored too, so the logged value
is an estimate of KL and not of cross-entropy. A position has the same draws in every epoch.

Source: Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, with the teacher's own
distribution as the proposal (importance weights of 1), which needs no weights but the counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill.data.teacher_cache.base import ENTROPY, IDS, PROBS, CodecSpec, as_bytes, from_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Sampled(CodecSpec):
    """Ids drawn from the teacher with their counts: an unbiased estimate in few bytes.

    A token takes 2 bytes, one bit per draw, and about log2(vocabulary / different ids) + 2.5 bits per different id.
    """

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(50, ge=1, le=255)
    """Draws per position. The variance decreases as 1 / draws; the bytes grow more slowly, because ids repeat."""

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        import torch

        positions, vocabulary = teacher.shape
        probs = teacher.exp()
        drawn = probs.multinomial(self.draws, replacement=True, generator=generator)
        rows = torch.arange(positions, device=teacher.device).unsqueeze(1)
        found, counts = torch.unique(rows * vocabulary + drawn, return_counts=True)  # sorted by position, then id
        entropy = -torch.special.xlogy(probs, probs).sum(-1)
        return [entropy.to(torch.float16), found % vocabulary, counts]

    def pack(self, fields: list[Tensor], width: int) -> Tensor:
        import numpy as np
        import torch

        from distill.data.teacher_cache.sorted_ids import pack_sorted

        entropy, ids, counts = fields
        # one bit per draw, 1 at the last draw of each id: the distances between the ones are the counts
        last = counts.numpy().cumsum() - 1
        draws = np.zeros(len(entropy) * self.draws, np.uint8)
        draws[last] = 1
        rising = pack_sorted(last // self.draws * width + ids.numpy(), len(entropy) * width)
        bits = np.packbits(draws, bitorder="little")
        return torch.cat([as_bytes(entropy), torch.from_numpy(np.concatenate([bits, rising]))])

    def bytes_per_token(self, vocabulary: int, hidden: int) -> float:
        different = min(self.draws, vocabulary) / 2  # about half of 50 draws repeat an id
        return 2 + self.draws / 8 + different * (math.log2(vocabulary / different) + 2.5) / 8

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        import numpy as np
        import torch

        from distill.data.teacher_cache.sorted_ids import unpack_sorted

        entropy = from_bytes(data[: 2 * num_positions], torch.float16, num_positions).float()
        rest, num_draws = data[2 * num_positions :].numpy(), num_positions * self.draws
        split = -(-num_draws // 8)
        last = np.flatnonzero(np.unpackbits(rest[:split], count=num_draws, bitorder="little").view(bool))
        position = last // self.draws
        rising = unpack_sorted(rest[split:], len(last), num_positions * width)
        different = np.bincount(position, minlength=num_positions)
        column = np.arange(len(last)) - np.repeat(different.cumsum() - different, different)
        ids = np.zeros((num_positions, int(different.max())), np.int64)
        weights = np.zeros(ids.shape, np.float32)
        ids[position, column] = rising - position * width
        weights[position, column] = np.diff(last, prepend=-1) / self.draws
        return {IDS: torch.from_numpy(ids), PROBS: torch.from_numpy(weights), ENTROPY: entropy}
