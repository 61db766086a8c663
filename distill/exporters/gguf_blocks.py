"""Weights in llama.cpp's block formats: codes are stored without change, full-precision weights may be rounded.

    F16    w
    Q8_0   32 codes of 8 bits and an fp16 scale      w = scale * code            code -128 ... 127
    Q6_K   256 codes of 6 bits, 16 scales of 8 bits  w = (d * scale) * (code - 32)   code 0 ... 63
           for 16 codes each, and an fp16 d
    Q4_0   32 codes of 4 bits and an fp16 scale      w = scale * (code - 8)      code 0 ... 15
    TQ2_0  256 codes of 2 bits and an fp16 scale     w = scale * (code - 1)      code 0, 1, 2

Source: the block layouts of ggml, https://github.com/ggml-org/llama.cpp (ggml/src/ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from distill.core.errors import InputError
from distill.quantization.base import Codes
from distill.quantization.blocks import SUPER_BLOCK
from distill.quantization.q6_k import Q6K, SUB_BLOCK

# (name, weights that share a scale, smallest and largest code), the smallest format first
FORMATS = (("TQ2_0", 256, -1, 1), ("Q4_0", 32, -8, 7), ("Q8_0", 32, -128, 127))
PLAIN = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q4_0": "Q4_0"}


@dataclass(frozen=True)
class FileTensor:
    """A weight as stored in the file.

    Attributes:
        format: ``F32``, ``F16``, ``Q8_0``, ``Q6_K``, ``Q4_0`` or ``TQ2_0``.
        data: the stored array; its leading dimensions are those of the weight, the last may be bytes.
        values: fp32, the dequantized values that an engine should read.
        from_codes: whether the weight was trained with a quantizer and is stored from its codes.
        moved_scales: number of scales that changed when they were rounded to fp16.
    """

    format: str
    data: numpy.ndarray
    values: numpy.ndarray
    from_codes: bool = False
    moved_scales: int = 0


def plain_blocks(name: str, weight: Tensor, wanted: str) -> FileTensor:
    """A full-precision weight in one of the formats :data:`PLAIN`, rounded in the same way as llama.cpp's quantizer.

    Raises:
        InputError: the row length is not a multiple of the block size, or a value is outside the range of fp16.
    """
    array = weight.float().contiguous().numpy()
    kind = PLAIN[wanted]
    if kind == "F16" and not (numpy.abs(array) <= numpy.finfo(numpy.float16).max).all():
        raise InputError(
            f"{name}: a value is outside the range of fp16; if this is the embedding or the head, set embeddings: f32"
        )
    if kind in ("F32", "F16"):
        data = array.astype(numpy.float32 if kind == "F32" else numpy.float16)
        return FileTensor(kind, data, data.astype(numpy.float32))
    if kind == "Q6_K":
        return replace(code_blocks(name, Q6K().quantize(weight)), from_codes=False)
    if array.shape[-1] % 32:
        raise InputError(
            f"{name}: {kind} needs rows of a multiple of 32 weights (got {array.shape[-1]}); choose another "
            "round_to or "
            "embeddings"
        )
    data = quants.quantize(array, GGMLQuantizationType[kind])
    return FileTensor(kind, data, quants.dequantize(data, GGMLQuantizationType[kind]))


def code_blocks(name: str, codes: Codes) -> FileTensor:
    """Trained codes in the smallest format that can store them; only scales may be rounded, to fp16.

    Raises:
        InputError: no format has these codes, or a block size that divides the group size.
    """
    if codes.values.dtype != torch.int8 or codes.zero_point is not None:
        what = "asymmetric" if codes.zero_point is not None else str(codes.values.dtype).removeprefix("torch.")
        raise InputError(
            f"{name}: GGUF has no format for {what} codes; train with a symmetric integer quantizer (q8_0, q4_0, "
            "int_group, ternary)"
        )
    values = codes.values.numpy()  # [out, in]
    scale = codes.scale.float().numpy()  # [out, groups]
    group = values.shape[-1] // scale.shape[-1]
    low, high = int(values.min()), int(values.max())
    if group == SUB_BLOCK and values.shape[-1] % SUPER_BLOCK == 0 and -32 <= low <= high <= 31:
        return _q6_k(name, values, scale)
    fitting = [
        (kind, size) for kind, size, least, most in FORMATS if group % size == 0 and least <= low <= high <= most
    ]
    if not fitting:
        raise InputError(
            f"{name}: {group} weights share a scale, and llama.cpp's formats have one scale per 32 weights; use a "
            "group_size, or in_features for one scale per row, that is a multiple of 32"
        )
    kind, size = fitting[0]
    scale = numpy.repeat(scale, group // size, axis=-1)  # [out, blocks]
    with numpy.errstate(over="ignore"):
        half = scale.astype(numpy.float16)
    if not numpy.isfinite(half).all():
        raise InputError(
            f"{name}: a scale is {scale.max():.3g}, which is outside the range of fp16, the type of scales in "
            "llama.cpp's "
            "formats; check the model's weights"
        )
    used = values.reshape(*scale.shape, size).any(-1)  # [out, blocks]; the scale of a block of zeros does not matter
    read = numpy.repeat(half.astype(numpy.float32), size, axis=-1) * values  # [out, in]
    moved = int(((half != scale) & used).sum())
    return FileTensor(kind, _pack(kind, values, half), read, from_codes=True, moved_scales=moved)


def _q6_k(name: str, values: numpy.ndarray, scale: numpy.ndarray) -> FileTensor:
    """Codes whose scales are an fp16 number times an int8 code per sub-block: those of the quantizer ``q6_k``.

    Raises:
        InputError: the scales are no such products.
    """
    rows = len(values)
    steps = scale.reshape(rows, -1, 16)  # [out, blocks, 16]
    largest = numpy.take_along_axis(steps, numpy.abs(steps).argmax(-1)[..., None], -1)  # its code is -128
    factor = (largest / -128).astype(numpy.float16)  # [out, blocks, 1]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        subs = numpy.nan_to_num(steps / factor.astype(numpy.float32))
    whole = subs.astype(numpy.int8)
    if not numpy.array_equal(whole.astype(numpy.float32) * factor.astype(numpy.float32), steps):
        raise InputError(
            f"{name}: GGUF's Q6_K stores scales as multiples of one fp16 number per 256 weights, and these are not; "
            "train with q6_k, or with groups of a multiple of 32"
        )
    # two halves of 128 codes, each [4, 32]: 4 low bits of two codes a byte, 2 high bits of four
    codes = (values + 32).astype(numpy.uint8).reshape(rows, -1, 2, 4, 32)
    low = (codes[..., :2, :] & 15) | (codes[..., 2:, :] & 15) << 4  # [out, blocks, 2, 2, 32]
    high = numpy.bitwise_or.reduce(codes >> 4 << numpy.arange(0, 8, 2, dtype=numpy.uint8)[:, None], axis=-2)
    blocks = len(factor[0])
    data = _rows(
        low.reshape(rows, blocks, 128),
        high.reshape(rows, blocks, 64),
        whole.view(numpy.uint8),
        factor.view(numpy.uint8),
    )
    read = numpy.repeat(scale, 16, axis=-1) * values
    return FileTensor("Q6_K", data, read, from_codes=True)


def _pack(kind: str, values: numpy.ndarray, scale: numpy.ndarray) -> numpy.ndarray:
    """int8 [out, in] and fp16 [out, blocks] -> uint8 [out, bytes of a row]."""
    rows, num_blocks = scale.shape
    scale_bytes = scale.reshape(rows, num_blocks, 1).view(numpy.uint8)
    if kind == "Q8_0":
        packed = values.reshape(rows, num_blocks, 32).view(numpy.uint8)
        return _rows(scale_bytes, packed)
    if kind == "Q4_0":
        # 16 bytes per block: byte i has weight i in its low 4 bits and weight i + 16 in its high 4 bits
        halves = (values + 8).astype(numpy.uint8).reshape(rows, num_blocks, 2, 16)
        return _rows(scale_bytes, halves[:, :, 0] | halves[:, :, 1] << 4)
    # TQ2_0: two halves of 128 weights; byte i of a half has its weights i, i + 32, i + 64 and i + 96
    quarters = (values + 1).astype(numpy.uint8).reshape(rows, num_blocks, 2, 4, 32)
    shifted = quarters << numpy.arange(0, 8, 2, dtype=numpy.uint8).reshape(4, 1)
    return _rows(numpy.bitwise_or.reduce(shifted, axis=3).reshape(rows, num_blocks, 64), scale_bytes)


def _rows(*parts: Any) -> numpy.ndarray:
    joined = numpy.concatenate(parts, axis=-1)
    return numpy.ascontiguousarray(joined.reshape(joined.shape[0], -1))
