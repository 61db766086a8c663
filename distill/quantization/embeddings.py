"""The grid of the input embeddings and of the output head, which are most of a small model's bytes.

    q8_0    GGUF's Q8_0: int8 in blocks of 32 with a float16 scale                                        8.5 bits
    q6_k    GGUF's Q6_K: 6 bits in blocks of 256; in compressed-tensors, 10 bits                          6.6 bits
    int8    int8 with one bfloat16 scale per row                                                          8.0 bits
    keep    as they are: 16 bits

By default they are quantized where the layers have 4 bits or fewer: to int8 in blocks of 32, which every export target
stores without another rounding (GGUF as Q8_0). The scale has the type of the layers' scales, so that a model folder
needs only one type; for GGUF's own grids that makes it exactly ``q8_0``. Rows that 32 does not divide get ``int8``.
"""

from __future__ import annotations

from typing import Literal

from distill.quantization.base import QuantizerSpec
from distill.quantization.blocks import BLOCK
from distill.quantization.int8_channel import Int8Channel
from distill.quantization.int_group import IntGroup
from distill.quantization.q6_k import Q6K
from distill.quantization.q8_0 import Q80

EmbeddingsKind = Literal["q8_0", "q6_k", "int8", "keep"]
FEW_BITS = 4
"""Layers of at most so many bits have quantized embeddings by default."""


def embeddings_grid(
    kind: EmbeddingsKind | None, layers: QuantizerSpec, width: int | None = None
) -> QuantizerSpec | None:
    """The grid of embeddings and head; None: they are kept.

    Args:
        kind: what was asked for; None: by the grid of the layers.
        layers: the grid of the layers.
        width: length of a row of the embeddings; None: one that 32 divides.
    """
    if kind is not None:
        return {"q8_0": Q80(), "q6_k": Q6K(), "int8": Int8Channel(), "keep": None}[kind]
    if layers.compressed_tensors_arguments()["num_bits"] > FEW_BITS:
        return None
    if width is not None and width % BLOCK:
        return Int8Channel()
    return Q80() if layers.scale_dtype == "float16" else IntGroup(bits=8, group_size=BLOCK)
