"""Functions shared by the quantizers for GGUF: blocks of fixed size, ggml's rounding, compressed-tensors arguments."""

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
            f"{kind} needs in_features ({in_features}) to be a multiple of its block size ({block}); add the layer to "
            "skip, or choose another quantizer"
        )
    return in_features // block


def block_arguments(num_bits: int, block: int) -> dict[str, Any]:
    """Arguments of a symmetric compressed-tensors grid whose group is the block; the format allows negative scales."""
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": block,
    }


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0. As in ggml, which multiplies by it: a division would round differently."""
    return (1 / scale).masked_fill(scale == 0, 0.0)


def round_half_away(values: Tensor) -> Tensor:
    """Round to the nearest integer, halves away from zero, like C's ``roundf``."""
    magnitude = values.abs()
    whole = magnitude.floor()
    return (whole + (magnitude - whole >= 0.5)) * values.sign()
