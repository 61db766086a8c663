"""The contract of a codec: a teacher's output at some positions to bytes, and back to what a loss reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HIDDEN = "teacher_hidden"
IDS, PROBS, TAIL, ENTROPY = "teacher_ids", "teacher_probs", "teacher_tail", "teacher_entropy"
"""Keys of a batch under which a decoded signal travels."""
_ROUNDING = 1e-2
"""How far above its bound a figure may lie that was stored in half precision."""


class CodecSpec(Spec):
    """How much of a teacher's distribution is kept, and in which bytes.

    A row is encoded position by position, so that chunks of it give the same fields as the whole, and the fields of all
    its positions are packed into bytes together.
    """

    whole: ClassVar[bool] = False
    """Whether the whole distribution can be reconstructed, so that any loss can be computed."""
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

    def bytes_per_token(self, vocabulary: int, hidden: int) -> float:
        """Bytes of a position on disk, about, for the forecast of a run.

        Args:
            vocabulary: rows of the teacher's head.
            hidden: its hidden size.
        """
        raise NotImplementedError

    def refuses(self, vocabulary: int) -> str | None:
        """Why this vocabulary cannot be coded, as one line; None when it can."""
        if vocabulary > 1 << 24:
            return f"codec {self.kind}: ids have at most 24 bits, the vocabulary has {vocabulary:,} tokens"
        return None


def decoded(codec: CodecSpec, data: Tensor, num_positions: int, width: int) -> dict[str, Tensor]:
    """Decode the bytes of a row and check that the values are possible.

    Args:
        codec: the one that encoded the row.
        data: uint8, its bytes.
        num_positions: in it.
        width: vocabulary or hidden size, whichever the codec codes.

    Raises:
        ValueError: these are no bytes of such a row.
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
    """The smallest and the largest value that can stand under a key of a batch."""
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
    """uint8 [bytes] to ``shape`` of ``dtype``; copies, as a slice of a file need not be aligned."""
    return data.clone().view(dtype).view(*shape)
