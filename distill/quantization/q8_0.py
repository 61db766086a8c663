"""GGUF's Q8_0: int8 weights in blocks of 32 with a float16 scale, as in llama.cpp.

    s = max_{i in g} |w_i| / 127,   code_i = round_half_away(w_i * (1 / s)),   stored scale = float16(s)

Prefer it for a student that will run in llama.cpp and whose quality must not change: the file has the same weights as
the training. The codes are computed with the fp32 scale, which is rounded afterwards, as in llama.cpp. Quantizing the
result again gives the same codes and scales, because the largest code is always 127.

Source: ggml's reference quantizer, https://github.com/ggml-org/llama.cpp (ggml-quants.c, quantize_row_q8_0_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.blocks import BLOCK, block_arguments, count_blocks, reciprocal, round_half_away

if TYPE_CHECKING:
    from torch import Tensor


class Q80(QuantizerSpec):
    """int8 weights in blocks of 32, bitwise equal to GGUF's Q8_0."""

    scale_dtype: ClassVar[str] = "float16"

    kind: Literal["q8_0"] = "q8_0"

    @property
    def gguf_type(self) -> str:
        return "Q8_0"

    def label(self) -> str:
        return "Q8_0"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return block_arguments(8, BLOCK)

    def groups(self, in_features: int) -> int:
        """in_features / 32.

        Raises:
            InputError: 32 does not divide in_features.
        """
        return count_blocks(in_features, BLOCK, "Q8_0")

    def limits(self) -> tuple[float, float]:
        return -128, 127

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        # [out_features, groups, group]
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        if scale is None:
            largest = grouped.abs().amax(-1)  # [out_features, groups]
            scale = largest / largest.new_full((), 127)
        values = round_half_away(grouped * reciprocal(scale.float()).unsqueeze(-1)).clamp(-128, 127)
        return Codes(values.flatten(-2).char(), scale.half())
