"""int8 weights, one scale an output channel: half the size of bfloat16 at next to no loss.

    scale_o = max_i |w_oi| / 127.5,   w_oi ~ scale_o * clamp(round(w_oi / scale_o), -128, 127)

Prefer it when quality must not move; :mod:`int4_group <distill.quantization.int4_group>` is half as large again.
Weights only: activations stay as they are.

Source: Jacob et al. 2017, arXiv 1712.05877, section 2.1 (there affine); the symmetric form is compressed-tensors'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.quantization.base import Codes, QuantizerSpec, symmetric_dequantize, symmetric_quantize

if TYPE_CHECKING:
    from torch import Tensor


class Int8Channel(QuantizerSpec):
    """Symmetric int8 weights with one scale an output channel."""

    bits: ClassVar[int] = 8

    kind: Literal["int8_channel"] = "int8_channel"

    def label(self) -> str:
        return "int8, per channel"

    def groups(self, in_features: int) -> int:
        """One, whatever the width."""
        return 1

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        return symmetric_quantize(weight, bits=self.bits, groups=1, scale=scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return symmetric_dequantize(codes)
