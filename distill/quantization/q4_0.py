"""GGUF's Q4_0: 4-bit weights in blocks of 32 with a float16 scale, as in llama.cpp; 0.28 of the size of bfloat16.

    s = (the signed weight of largest magnitude) / -8,   code_i = min(15, floor(w_i * (1 / s) + 8.5)) - 8
    stored scale = float16(s)

Prefer it to :mod:`int_group <distill.quantization.int_group>` for a student that will run in llama.cpp: the file has
the same weights as the training, whereas llama.cpp's own quantizer would round an int4 student a second time. The code
-8 is exactly the weight of largest magnitude, so quantizing the result again changes nothing.

Source: ggml's reference quantizer, https://github.com/ggml-org/llama.cpp (ggml-quants.c, quantize_row_q4_0_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.blocks import BLOCK, block_arguments, count_blocks, reciprocal

if TYPE_CHECKING:
    from torch import Tensor


class Q40(QuantizerSpec):
    """4-bit weights in blocks of 32, bitwise equal to GGUF's Q4_0."""

    scale_dtype: ClassVar[str] = "float16"

    kind: Literal["q4_0"] = "q4_0"

    @property
    def gguf_type(self) -> str:
        return "Q4_0"

    def label(self) -> str:
        return "Q4_0"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return block_arguments(4, BLOCK)

    def groups(self, in_features: int) -> int:
        """in_features / 32.

        Raises:
            InputError: 32 does not divide in_features.
        """
        return count_blocks(in_features, BLOCK, "Q4_0")

    def limits(self) -> tuple[float, float]:
        return -8, 7

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        # [out_features, groups, group]
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        if scale is None:
            # of equal magnitudes the first, as in the reference
            where = grouped.abs().argmax(-1, keepdim=True)  # [out_features, groups, 1]
            scale = grouped.gather(-1, where).squeeze(-1) / -8
        values = (grouped * reciprocal(scale.float()).unsqueeze(-1) + 8.5).floor().clamp(0, 15) - 8
        return Codes(values.flatten(-2).char(), scale.half())
