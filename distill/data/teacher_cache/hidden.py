"""The teacher's final hidden states in bf16: the whole distribution, through the teacher's own head.

The head is copied beside the cache and is all of the teacher that training loads. Every loss and temperature works. Two
bytes per hidden channel and token: smaller than top_k for small teachers, 8 kB at a hidden size of 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.data.teacher_cache.base import HIDDEN, CodecSpec, as_bytes, from_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Hidden(CodecSpec):
    """Final hidden states in bf16, exact to their rounding; 2 bytes per channel, and the teacher's head once."""

    whole: ClassVar[bool] = True
    reads: ClassVar[Literal["logits", "hidden"]] = "hidden"

    kind: Literal["hidden"] = "hidden"

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        import torch

        return [teacher.to(torch.bfloat16)]

    def pack(self, fields: list[Tensor], width: int) -> Tensor:
        return as_bytes(fields[0])

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        import torch

        return {HIDDEN: from_bytes(data, torch.bfloat16, num_positions, width)}

    def bytes_per_token(self, vocabulary: int, hidden: int) -> float:
        return 2.0 * hidden

    def refuses(self, vocabulary: int) -> str | None:
        return None
