"""Binary weights, {-s, s}: the smallest number of values a weight can have.

    s = mean |w|,   w_i ~ s * (1 if w_i >= 0 else -1)

with the mean over groups along a row. For experiments rather than deployment: the quality is far below that of
:mod:`ternary <distill.quantization.ternary>`, and the export formats store two bits per code. Always train with it.

Source: Rastegari et al. 2016, arXiv 1603.05279, section 3.1 (the scale that is optimal for signs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.quantization.base import Codes, QuantizerSpec, count_groups
from distill.quantization.blocks import SUPER_BLOCK, block_arguments

if TYPE_CHECKING:
    from torch import Tensor


class Binary(QuantizerSpec):
    """Weights with two values, -s and s, where s is the mean magnitude of a group."""

    scale_dtype: ClassVar[str] = "float16"
    keeps_zero: ClassVar[bool] = False

    kind: Literal["binary"] = "binary"
    group_size: int = Field(32, ge=8)
    """Weights that share a scale; must divide every layer's in_features."""

    @property
    def gguf_type(self) -> str | None:
        """TQ2_0, which stores ternary codes; binary codes are ternary codes without zero."""
        return "TQ2_0" if self.group_size % SUPER_BLOCK == 0 else None

    def label(self) -> str:
        return f"binary, group {self.group_size}"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return block_arguments(2, self.group_size)

    def groups(self, in_features: int) -> int:
        """in_features / group_size.

        Raises:
            InputError: group_size does not divide in_features.
        """
        return count_groups(in_features, self.group_size)

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        scale = (grouped.abs().mean(-1) if scale is None else scale).half()
        values = (grouped >= 0).char() * 2 - 1
        return Codes(values.flatten(-2), scale)
