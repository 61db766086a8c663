"""Ternary weights, {-s, 0, s}: about 2 bits per weight as stored, and llama.cpp's fastest format on a CPU.

    s = mean |w|,   w_i ~ s * clamp(round(w_i / s), -1, 1)

with the mean over the weight matrix, or over groups along a row. Always train with it: rounding alone to three values
destroys a model. It needs far more training tokens than 4 bits. With one scale per matrix, or groups of 256, GGUF's
TQ2_0 can store the codes. The gradient is straight-through everywhere, as in the source.

Source: Ma et al. 2024, arXiv 2402.17764, section 2 (absmean quantization).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.quantization.base import Codes, QuantizerSpec, count_groups
from distill.quantization.blocks import SUPER_BLOCK, block_arguments

if TYPE_CHECKING:
    from torch import Tensor


class Ternary(QuantizerSpec):
    """Weights with three values, -s, 0 and s, where s is the mean magnitude."""

    scale_dtype: ClassVar[str] = "float16"

    kind: Literal["ternary"] = "ternary"
    group_size: int | None = Field(None, ge=8)
    """Weights that share a scale, 256 for GGUF; null: one scale per weight matrix."""

    @property
    def gguf_type(self) -> str | None:
        """TQ2_0, if no two scales fall into one of its blocks."""
        return "TQ2_0" if self.group_size is None or self.group_size % SUPER_BLOCK == 0 else None

    @property
    def is_by_row(self) -> bool:
        return self.group_size is not None

    def label(self) -> str:
        return "ternary, " + (f"group {self.group_size}" if self.group_size else "per tensor")

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        arguments = block_arguments(2, self.group_size or 0)
        if self.group_size is None:
            del arguments["group_size"]
            arguments["strategy"] = "channel"  # one scale per row, all equal
        return arguments

    def groups(self, in_features: int) -> int:
        """in_features / group_size, or 1.

        Raises:
            InputError: group_size does not divide in_features.
        """
        return 1 if self.group_size is None else count_groups(in_features, self.group_size)

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        # [out_features, groups, group]
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        if scale is None:
            magnitude = grouped.abs()
            # [out_features, groups]
            scale = magnitude.mean(-1) if self.group_size else magnitude.mean().expand(grouped.shape[:-1])
        scale = scale.half()
        scale = scale.masked_fill(scale == 0, 1.0)
        values = (grouped / scale.float().unsqueeze(-1)).round().clamp(-1, 1)
        return Codes(values.flatten(-2).char(), scale)
