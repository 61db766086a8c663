"""GGUF's Q6_K: 6-bit weights in blocks of 256, with a scale per 16 weights that is itself an 8-bit code.

    s_j = (the signed weight of largest magnitude of sub-block j) / -32           16 weights per sub-block
    d = (the s_j of largest magnitude) / -128,   sub_j = round(s_j * (1 / d)),    16 sub-blocks per block
    scale_j = float16(d) * sub_j,   code_i = clamp(round(w_i / scale_j), -32, 31)

6.56 bits per weight. Prefer it to :mod:`q8_0 <distill.quantization.q8_0>` for embeddings and heads that will run in
llama.cpp and must be smaller still; llama.cpp's own files of 4 bits use it there. ``scale`` holds the products
``float16(d) * sub_j``, which are exact in float32 (11 and 8 significant bits); the exporter factors them again.

llama.cpp's quantizer takes the same steps, and between the first and the second searches 18 other values of each s_j
for the least squared error. That search is left out here, because it would be repeated at every training step, and
training moves the weights anyway.

Source: ggml's reference quantizer, https://github.com/ggml-org/llama.cpp (ggml-quants.c, quantize_row_q6_K_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.core.errors import InputError
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.blocks import SUPER_BLOCK, block_arguments, reciprocal

if TYPE_CHECKING:
    from torch import Tensor

SUB_BLOCK = 16


class Q6K(QuantizerSpec):
    """6-bit weights in blocks of 256, a grid of GGUF's Q6_K."""

    scale_dtype: ClassVar[str] = "float32"

    kind: Literal["q6_k"] = "q6_k"

    @property
    def gguf_type(self) -> str:
        return "Q6_K"

    def label(self) -> str:
        return "Q6_K"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return block_arguments(6, SUB_BLOCK)

    def groups(self, in_features: int) -> int:
        """in_features / 16.

        Raises:
            InputError: 256 does not divide in_features.
        """
        if in_features % SUPER_BLOCK:
            raise InputError(
                f"Q6_K needs rows ({in_features}) to be a multiple of its block size ({SUPER_BLOCK}); use q8_0, whose "
                "blocks are of 32, or skip the layer"
            )
        return in_features // SUB_BLOCK

    def limits(self) -> tuple[float, float]:
        return -32, 31

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        if scale is None:
            self.groups(weight.shape[-1])
            scale = _scales(weight.detach().float().unflatten(-1, (-1, SUPER_BLOCK // SUB_BLOCK, SUB_BLOCK)))
        scale = scale.float()
        grouped = weight.detach().float().unflatten(-1, (scale.shape[-1], -1))  # [out, groups, per group]
        exact = (grouped / scale.unsqueeze(-1)).masked_fill((scale == 0).unsqueeze(-1), 0.0)
        return Codes(exact.round().clamp(-32, 31).flatten(-2).char(), scale)


def _scales(grouped: Tensor) -> Tensor:
    """The scales float16(d) * sub of blocks [out, blocks, 16, 16]: fp32 [out, blocks * 16]."""
    steps = _signed_largest(grouped) / -32  # [out, blocks, 16]
    factor = _signed_largest(steps).unsqueeze(-1) / -128  # [out, blocks, 1]
    subs = (steps * reciprocal(factor)).round().clamp(-128, 127)
    return (factor.half().float() * subs).flatten(-2)


def _signed_largest(values: Tensor) -> Tensor:
    """The value of largest magnitude along the last dimension, of equal ones the first."""
    return values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
