"""GGUF's TQ2_0: ternary weights in blocks of 256 with a float16 scale, as computed by llama.cpp's own quantizer.

    s = max_{i in g} |w_i|,   code_i = round_half_away(w_i * (1 / s)) in {-1, 0, 1},   stored scale = float16(s)

Use it for a model that is ternary already, or as a control that shows the effect of llama.cpp's quantizer on another
model: the scale is the largest of 256 weights, so most of the others become zero. To train a ternary student, use
:mod:`ternary <distill.quantization.ternary>`, whose codes this format stores without change. Quantizing the result
again changes nothing.

Source: ggml's reference quantizer, https://github.com/ggml-org/llama.cpp (ggml-quants.c, quantize_row_tq2_0_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.blocks import SUPER_BLOCK, block_arguments, count_blocks, reciprocal, round_half_away

if TYPE_CHECKING:
    from torch import Tensor


class Tq20(QuantizerSpec):
    """Ternary weights in blocks of 256, bitwise equal to GGUF's TQ2_0."""

    scale_dtype: ClassVar[str] = "float16"

    kind: Literal["tq2_0"] = "tq2_0"

    @property
    def gguf_type(self) -> str:
        return "TQ2_0"

    def label(self) -> str:
        return "TQ2_0"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return block_arguments(2, SUPER_BLOCK)

    def groups(self, in_features: int) -> int:
        """in_features / 256.

        Raises:
            InputError: 256 does not divide in_features.
        """
        return count_blocks(in_features, SUPER_BLOCK, "TQ2_0")

    def limits(self) -> tuple[float, float]:
        return -1, 1

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        # [out_features, groups, group]
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        scale = grouped.abs().amax(-1) if scale is None else scale.float()  # [out_features, groups]
        values = round_half_away(grouped * reciprocal(scale).unsqueeze(-1)).clamp(-1, 1)
        return Codes(values.flatten(-2).char(), scale.half())
