"""What the grids of GGUF share: blocks of fixed width, their rounding, and their words in compressed-tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
SUPER_BLOCK = 256


def count_blocks(in_features: int, block: int, kind: str) -> int:
    """in_features / block.

    Raises:
        InputError: the block does not divide in_features.
    """
    if in_features % block:
        raise InputError(
            f"{kind} has blocks of {block} weights, which do not divide in_features ({in_features}); add the layer to "
            "skip or choose another quantizer"
        )
    return in_features // block


def block_arguments(num_bits: int, block: int) -> dict[str, Any]:
    """A symmetric grid of compressed-tensors with the block as its group; the format allows a negative scale."""
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": block,
    }


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a block of zeros: ggml multiplies by it, which rounds otherwise than a division."""
    return (1 / scale).masked_fill(scale == 0, 0.0)


def round_half_away(values: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero, as C's ``roundf``."""
    magnitude = values.abs()
    whole = magnitude.floor()
    return (whole + (magnitude - whole >= 0.5)) * values.sign()
