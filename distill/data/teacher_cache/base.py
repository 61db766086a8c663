"""The interface of a codec, which encodes a teacher's output as bytes and decodes them to what a loss reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HIDDEN = "teacher_hidden"
IDS, PROBS, TAIL, ENTROPY = "teacher_ids", "teacher_probs", "teacher_tail", "teacher_entropy"
"""Keys of a batch that hold the decoded output of the teacher."""
_ROUNDING = 1e-2
"""Tolerance for bounds of values stored in half precision."""


class CodecSpec(Spec):
    """How much of a teacher's distribution is stored, and how it is encoded.

    :meth:`encode` treats each position separately, so a row can be encoded in chunks. :meth:`pack` then writes the
    fields of all positions of the row to bytes at once.
    """

    whole: ClassVar[bool] = False
    """Whether the whole distribution can be reconstructed, so that any loss can be computed."""
    reads: ClassVar[Literal["logits", "hidden"]] = "logits"
    """Which output of the teacher is encoded."""

    kind: str

    def encode(self, teacher: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Encode the output at some positions as fields.

        Args:
            teacher: log-probabilities fp32 [positions, vocabulary], or hidden states [positions, hidden].
            generator: random numbers for a codec that samples; on the device of ``teacher``.

        Returns:
            Tensors that can be concatenated along their first dimension.
        """
        raise NotImplementedError

    def pack(self, fields: list[Tensor], width: int) -> Tensor:
        """Pack the fields of a row into bytes, uint8.

        Args:
            fields: results of :meth:`encode` for all its positions, concatenated, on the CPU.
            width: vocabulary (rows of the teacher's head) or hidden size, whichever is encoded.
        """
        raise NotImplementedError

    def decode(self, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
        """Decode the bytes of :meth:`pack` to the stored part of the teacher's output.

        Args:
            data: uint8, all bytes of a row.
            num_positions: number of positions in it.
            width: as for :meth:`pack`.

        Returns:
            Key of the batch -> [positions] or [positions, any].
        """
        raise NotImplementedError

    def bytes_per_token(self, vocabulary: int, hidden: int) -> float:
        """Approximate number of bytes per position on disk, for the forecast of a run.

        Args:
            vocabulary: number of rows of the teacher's head.
            hidden: hidden size of the teacher.
        """
        raise NotImplementedError

    def refuses(self, vocabulary: int) -> str | None:
        """Why this vocabulary cannot be encoded, as one line; None if it can."""
        if vocabulary > 1 << 24:
            return f"codec {self.kind}: ids have at most 24 bits, the vocabulary has {vocabulary:,} tokens"
        return None


def decoded(codec: CodecSpec, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
    """Decode the bytes of a row and check that the values are possible.

    Args:
        codec: the codec that encoded the row.
        data: uint8, its bytes.
        num_positions: number of positions in it.
        width: vocabulary or hidden size, whichever the codec encodes.

    Raises:
        ValueError: the bytes are not those of such a row.
    """
    try:
        found = codec.decode(data, num_positions, width)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    for key, values in found.items():
        least, most = _bounds(key, width)
        if len(values) != num_positions or not values.isfinite().all():
            raise ValueError(f"{key} is not finite, or not of {num_positions} positions")
        if values.numel() and not least <= float(values.min()) <= float(values.max()) <= most:
            raise ValueError(
                f"{key} from {float(values.min()):g} to {float(values.max()):g}, expected {least:g} to {most:g}"
            )
    if PROBS in found:
        total = found[PROBS].sum(-1) + found.get(TAIL, 0.0)
        if not ((total - 1).abs() <= _ROUNDING).all():
            raise ValueError(f"probabilities that sum to {float(total.min()):g} to {float(total.max()):g}, expected 1")
    return found


def _bounds(key: str, width: int) -> tuple[float, float]:
    """The smallest and the largest valid value of a key of a batch."""
    if key == IDS:
        return 0, width - 1
    if key == ENTROPY:
        return -_ROUNDING, math.log(width) + _ROUNDING
    return (0, 1 + _ROUNDING) if key in (PROBS, TAIL) else (-math.inf, math.inf)


def as_bytes(values: Tensor) -> Tensor:
    """[...] of any dtype to uint8 [bytes], in the machine's (little-endian) order."""
    import torch

    return values.contiguous().flatten().view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """uint8 [bytes] to ``shape`` of ``dtype``; copies, because a slice of a file need not be aligned."""
    return data.clone().view(dtype).view(*shape)
