"""The contract of a codec: a teacher's output at some positions to bytes, and back to what a loss reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HIDDEN = "teacher_hidden"
IDS, PROBS, TAIL, ENTROPY = "teacher_ids", "teacher_probs", "teacher_tail", "teacher_entropy"
"""Keys of a batch under which a decoded signal travels."""


class CodecSpec(Spec):
    """How much of a teacher's distribution is kept, and in which bytes.

    A row is encoded position by position, so that chunks of it give the same fields as the whole, and the fields of all
    its positions are packed into bytes together.
    """

    whole: ClassVar[bool] = False
    """Whether the whole distribution can be had back, so that every loss can be taken from it."""
    reads: ClassVar[Literal["logits", "hidden"]] = "logits"
    """What of the teacher is coded."""

    kind: str

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        """The fields of some positions.

        Args:
            teacher: log-probabilities fp32 [positions, vocabulary], or hidden states [positions, hidden].
            generator: for a codec that draws; on the device of ``teacher``.

        Returns:
            Tensors that join along their first dimension.
        """
        raise NotImplementedError

    def pack(self, fields: list[Tensor], width: int) -> Tensor:
        """The bytes of a row, uint8.

        Args:
            fields: what :meth:`encode` gave for all its positions, on the CPU.
            width: vocabulary (rows of the teacher's head) or hidden size, whichever is coded.
        """
        raise NotImplementedError

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        """What :meth:`encode` was given, as far as it was kept, from what :meth:`pack` returned.

        Args:
            data: uint8, all bytes of a row.
            num_positions: in it.
            width: as for :meth:`pack`.

        Returns:
            Key of the batch -> [positions] or [positions, any].
        """
        raise NotImplementedError

    def refuses(self, vocabulary: int) -> str | None:
        """Why this vocabulary cannot be coded, as one line; None when it can."""
        if vocabulary > 1 << 24:
            return f"codec {self.kind}: ids have at most 24 bits, the vocabulary has {vocabulary:,} tokens"
        return None


def as_bytes(values: Tensor) -> Tensor:
    """[...] of any dtype to uint8 [bytes], in the machine's (little-endian) order."""
    import torch

    return values.contiguous().flatten().view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """uint8 [bytes] to ``shape`` of ``dtype``; copies, as a slice of a file need not be aligned."""
    return data.clone().view(dtype).view(*shape)
