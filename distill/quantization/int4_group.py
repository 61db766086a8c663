"""int4 weights, one scale a group of input channels: 0.28 of the size of bfloat16 with groups of 32.

    scale_og = max_{i in g} |w_oi| / 7.5,   w_oi ~ scale_og * clamp(round(w_oi / scale_og), -8, 7)

Prefer it when memory is what counts, and train on it: rounding alone costs a small model much. Smaller groups follow
the weight more closely and store more scales: (4 + 16 / group_size) bits a weight.

Source: Frantar et al. 2022, arXiv 2210.17323, section 4 (grouping); the grid is that of compressed-tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.quantization.base import Codes, QuantizerSpec, symmetric_dequantize, symmetric_quantize

if TYPE_CHECKING:
    from torch import Tensor


class Int4Group(QuantizerSpec):
    """Symmetric int4 weights with one scale a group of neighbouring input channels."""

    bits: ClassVar[int] = 4

    kind: Literal["int4_group"] = "int4_group"
    group_size: int = Field(32, ge=8)
    """Weights that share a scale; must divide every layer's in_features. Engines have kernels for 32, 64 and 128."""

    def label(self) -> str:
        return f"int4, group {self.group_size}"

    def groups(self, in_features: int) -> int:
        """in_features / group_size.

        Raises:
            InputError: group_size does not divide in_features.
        """
        if in_features % self.group_size:
            raise InputError(
                f"group_size ({self.group_size}) must divide in_features ({in_features})"
                + _proposal(in_features, self.group_size)
            )
        return in_features // self.group_size

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        return symmetric_quantize(weight, bits=self.bits, groups=self.groups(weight.shape[-1]), scale=scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return symmetric_dequantize(codes)


def _proposal(in_features: int, wanted: int) -> str:
    """``"; try 32 or 64"``: the nearest divisors on both sides, powers of two where there are any."""
    divisors = [size for size in range(8, in_features + 1) if in_features % size == 0]
    divisors = [size for size in divisors if size & (size - 1) == 0] or divisors
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    found = " or ".join(str(size) for size in below + above)
    return f"; try {found}" if found else "; no group fits, so add the layer to skip or use int8_channel"
