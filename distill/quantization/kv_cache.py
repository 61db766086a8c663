"""Keys and values as llama.cpp keeps them in a low-bit cache: rotated where it rotates them, then in blocks of 32.

    H = the Walsh-Hadamard matrix of n rows, over sqrt(n), so that H H = I
    k ~ H on_grid(H k),   n the largest 64, 128, 256... that divides head_dim
    v ~ H on_grid(H v),   n = 64

a token and a head at a time. Where 64 does not divide head_dim there is no rotation. The rotation spreads a key's few
large channels over all others, which the scale of a block would else pay for. The gradient passes straight through.

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
"""The smallest head that is rotated, and the width of a value's rotation."""
_GRIDS: dict[str, QuantizerSpec] = {"q8_0": Q80(), "q4_0": Q40()}


def check_cache(kind: str, head_dim: int) -> None:
    """Refuse what no cache of this type can hold.

    Raises:
        InputError: there is no such type, or blocks do not divide a head.
    """
    if not isinstance(kind, str) or kind not in _GRIDS:
        raise InputError(f"kv_cache: got {kind!r}, expected one of {', '.join(get_args(CacheType))}")
    if head_dim % BLOCK:
        raise InputError(f"kv_cache: {kind} has blocks of {BLOCK}, which do not divide head_dim ({head_dim}); unset it")


def round_keys(keys: Tensor, kind: CacheType, *, interleaved: bool = False) -> Tensor:
    """Keys as the cache gives them back, in their own type.

    Args:
        keys: [..., head_dim], after the rotary embedding.
        kind: of the cache.
        interleaved: whether the engine has the two halves of a head by turns, as llama.cpp's llama architecture does.
    """
    width = ROTATED
    while keys.shape[-1] % (2 * width) == 0:
        width *= 2
    if not interleaved:
        return _round(keys, kind, width)
    turns = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return _round(turns, kind, width).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def round_values(values: Tensor, kind: CacheType) -> Tensor:
    """Values as the cache gives them back, [..., head_dim], in their own type."""
    return _round(values, kind, ROTATED)


def _round(states: Tensor, kind: CacheType, width: int) -> Tensor:
    import torch

    from distill.quantization.fake_quant import fake_quantize

    if states.shape[-1] % width:
        return fake_quantize(states, _GRIDS[kind])
    matrix = rotation(width, states.device)
    with torch.autocast(states.device.type, enabled=False):
        turned = (states.float().unflatten(-1, (-1, width)) @ matrix).flatten(-2)
        back = fake_quantize(turned, _GRIDS[kind]).unflatten(-1, (-1, width)) @ matrix
    return back.flatten(-2).to(states.dtype)


def rotation(width: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix: fp32, [width, width], width a power of two."""
    import torch

    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / matrix.new_full((), width).sqrt()
