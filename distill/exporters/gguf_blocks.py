"""Weights as the blocks of llama.cpp's formats: codes go in as they are, plain weights may be rounded.

    F16    w
    Q8_0   32 codes of 8 bits and an fp16 scale      w = scale * code            code -128 ... 127
    Q4_0   32 codes of 4 bits and an fp16 scale      w = scale * (code - 8)      code 0 ... 15
    TQ2_0  256 codes of 2 bits and an fp16 scale     w = scale * (code - 1)      code 0, 1, 2

Source: the block layouts of ggml, https://github.com/ggml-org/llama.cpp (ggml/src/ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.quantization.base import Codes

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

# (name, weights of a block, smallest and largest code), the smallest format first
FORMATS = (("TQ2_0", 256, -1, 1), ("Q4_0", 32, -8, 7), ("Q8_0", 32, -128, 127))
PLAIN = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


@dataclass(frozen=True)
class FileTensor:
    """A weight as it is in the file.

    Attributes:
        format: ``F32``, ``F16``, ``Q8_0``, ``Q4_0`` or ``TQ2_0``.
        data: the bytes, as an array whose first axes are the weight's.
        values: fp32, what an engine has to read out of them.
        from_codes: whether the weight was trained on a grid, and nothing was rounded here.
        moved_scales: scales that fp16 does not hold exactly, and that were rounded to it.
    """

    format: str
    data: numpy.ndarray
    values: numpy.ndarray
    from_codes: bool = False
    moved_scales: int = 0


def plain_blocks(name: str, weight: Tensor, wanted: str) -> FileTensor:
    """A full-precision weight in one of :data:`PLAIN`, rounded as llama.cpp's own quantizer rounds.

    Raises:
        InputError: it does not fit: a row that is no multiple of the block, or a number beyond fp16.
    """
    import numpy
    from gguf import GGMLQuantizationType, quants

    array = weight.float().contiguous().numpy()
    kind = PLAIN[wanted]
    if kind == "F16" and not (numpy.abs(array) <= numpy.finfo(numpy.float16).max).all():
        raise InputError(f"{name}: has values that fp16 does not hold; set embeddings to f32 if it is one of those")
    if kind in ("F32", "F16"):
        data = array.astype(numpy.float32 if kind == "F32" else numpy.float16)
        return FileTensor(kind, data, data.astype(numpy.float32))
    if array.shape[-1] % 32:
        raise InputError(f"{name}: rows of {array.shape[-1]} weights cannot be written as {kind}, in blocks of 32")
    data = quants.quantize(array, GGMLQuantizationType[kind])
    return FileTensor(kind, data, quants.dequantize(data, GGMLQuantizationType[kind]))


def code_blocks(name: str, codes: Codes) -> FileTensor:
    """Trained codes in the smallest format that holds every one of them; nothing is rounded but, if need be, scales.

    Raises:
        InputError: no format has such codes, or blocks that divide the groups that share a scale.
    """
    import numpy
    import torch

    if codes.values.dtype != torch.int8 or codes.zero_point is not None:
        what = "asymmetric" if codes.zero_point is not None else str(codes.values.dtype).removeprefix("torch.")
        raise InputError(
            f"{name}: its codes are {what}, and GGUF has no format for them; train on a symmetric integer grid (q8_0, "
            "q4_0, int_group, ternary) to export it"
        )
    values = codes.values.numpy()
    scale = codes.scale.float().numpy()
    group = values.shape[-1] // scale.shape[-1]
    low, high = int(values.min()), int(values.max())
    fitting = [
        (kind, size) for kind, size, least, most in FORMATS if group % size == 0 and least <= low <= high <= most
    ]
    if not fitting:
        raise InputError(
            f"{name}: a scale is shared by {group} weights of a row, and llama.cpp's formats share one among 32 "
            "(expected a group_size, or rows, of a multiple of 32)"
        )
    kind, size = fitting[0]
    scale = numpy.repeat(scale, group // size, axis=-1)
    with numpy.errstate(over="ignore"):
        half = scale.astype(numpy.float16)
    if not numpy.isfinite(half).all():
        raise InputError(f"{name}: has a scale of {scale.max():.3g}, more than the fp16 of llama.cpp's formats holds")
    used = values.reshape(*scale.shape, size).any(-1)
    read = numpy.repeat(half.astype(numpy.float32), size, axis=-1) * values
    moved = int(((half != scale) & used).sum())
    return FileTensor(kind, _pack(kind, values, half), read, from_codes=True, moved_scales=moved)


def _pack(kind: str, values: numpy.ndarray, scale: numpy.ndarray) -> numpy.ndarray:
    """int8 [out, in] and fp16 [out, blocks] -> uint8 [out, bytes of a row]."""
    import numpy

    rows, num_blocks = scale.shape
    scale_bytes = scale.reshape(rows, num_blocks, 1).view(numpy.uint8)
    if kind == "Q8_0":
        packed = values.reshape(rows, num_blocks, 32).view(numpy.uint8)
        return _rows(scale_bytes, packed)
    if kind == "Q4_0":
        # the low halves of 16 bytes hold the first 16 weights of a block, the high halves the others
        halves = (values + 8).astype(numpy.uint8).reshape(rows, num_blocks, 2, 16)
        return _rows(scale_bytes, halves[:, :, 0] | halves[:, :, 1] << 4)
    # TQ2_0: two runs of 128 weights; byte i of a run holds its weights i, i + 32, i + 64 and i + 96
    quarters = (values + 1).astype(numpy.uint8).reshape(rows, num_blocks, 2, 4, 32)
    shifted = quarters << numpy.arange(0, 8, 2, dtype=numpy.uint8).reshape(4, 1)
    return _rows(numpy.bitwise_or.reduce(shifted, axis=3).reshape(rows, num_blocks, 64), scale_bytes)


def _rows(*parts: Any) -> numpy.ndarray:
    import numpy

    joined = numpy.concatenate(parts, axis=-1)
    return numpy.ascontiguousarray(joined.reshape(joined.shape[0], -1))
