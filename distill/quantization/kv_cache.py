"""Fake quantization of keys and values as in llama.cpp's low-bit cache: rotated, then quantized in blocks of 32.

    H = the Walsh-Hadamard matrix of n rows divided by sqrt(n), so that H H = I
    k ~ H quantized(H k),   n the largest of 64, 128, 256... that divides head_dim
    v ~ H quantized(H v),   n = 64

per token and head. There is no rotation if 64 does not divide head_dim. The rotation spreads the few large channels of
a key over all channels, so that they no longer determine the scale of their block. The gradient is straight-through.

Source: https://github.com/ggml-org/llama.cpp/pull/21038; Ashkboos et al. 2024, arXiv 2404.00456, for the rotation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from distill.core.errors import InputError
from distill.quantization.base import QuantizerSpec
from distill.quantization.blocks import BLOCK
from distill.quantization.q4_0 import Q40
from distill.quantization.q8_0 import Q80

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CacheType = Literal["q8_0", "q4_0"]
ROTATED = 64
"""The smallest head_dim that is rotated, and the width of the rotation of values."""
_GRIDS: dict[str, QuantizerSpec] = {"q8_0": Q80(), "q4_0": Q40()}


def check_cache(kind: str, head_dim: int) -> None:
    """Check that a cache of this type can be used.

    Raises:
        InputError: the type does not exist, or its block size does not divide ``head_dim``.
    """
    if not isinstance(kind, str) or kind not in _GRIDS:
        raise InputError(f"kv_cache: got {kind!r}, expected one of {', '.join(get_args(CacheType))}")
    if head_dim % BLOCK:
        raise InputError(
            f"kv_cache: {kind} needs head_dim ({head_dim}) to be a multiple of its block size ({BLOCK}); "
            "remove kv_cache"
        )


def round_keys(keys: Tensor, kind: CacheType, *, interleaved: bool = False) -> Tensor:
    """Keys after quantization and dequantization, in their own type.

    Args:
        keys: [..., head_dim], after the rotary embedding.
        kind: type of the cache.
        interleaved: whether the engine interleaves the two halves of a head, as llama.cpp does for Llama.
    """
    width = ROTATED
    while keys.shape[-1] % (2 * width) == 0:
        width *= 2
    if not interleaved:
        return _round(keys, kind, width)
    # [first half, second half] -> pairs (first_i, second_i), and back
    pairs = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return _round(pairs, kind, width).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def round_values(values: Tensor, kind: CacheType) -> Tensor:
    """Values [..., head_dim] after quantization and dequantization, in their own type."""
    return _round(values, kind, ROTATED)


def _round(states: Tensor, kind: CacheType, width: int) -> Tensor:
    import torch

    from distill.quantization.fake_quant import fake_quantize

    if states.shape[-1] % width:
        return fake_quantize(states, _GRIDS[kind])
    matrix = rotation(width, states.device)
    with torch.autocast(states.device.type, enabled=False):
        rotated = (states.float().unflatten(-1, (-1, width)) @ matrix).flatten(-2)  # [..., head_dim]
        restored = fake_quantize(rotated, _GRIDS[kind]).unflatten(-1, (-1, width)) @ matrix  # [..., head_dim/n, n]
    return restored.flatten(-2).to(states.dtype)


def rotation(width: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix: fp32, [width, width], width a power of two."""
    import torch

    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / matrix.new_full((), width).sqrt()
