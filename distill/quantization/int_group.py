"""Integer weights of 2 to 8 bits with one scale per group; 0.28 of the size of bfloat16 at 4 bits in groups of 32.

    w_oi ~ scale_og * (code_oi - zero_og),   code_oi in [-2^(bits-1), 2^(bits-1) - 1]

Prefer it to reduce memory, and train with it: rounding alone costs a small model much of its quality. Smaller groups
represent the weights better and store more scales: (bits + 16 / group_size) bits per weight. Asymmetric codes help only
where the weights of a group are mostly on one side of zero, which is rare in trained models: at most at 2 and 3 bits.

Source: Frantar et al. 2022, arXiv 2210.17323, section 4 (grouping); the grid is that of compressed-tensors, see
:mod:`distill.quantization.integer`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distill.quantization.base import count_groups
from distill.quantization.integer import IntegerSpec


class IntGroup(IntegerSpec):
    """Integer weights of 2 to 8 bits with one scale per group of neighbouring input channels."""

    kind: Literal["int_group"] = "int_group"
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    """Bits per code. Engines have kernels for 4 and 8; other widths only save disk space and transfer time."""
    group_size: int = Field(32, ge=8)
    """Weights that share a scale; must divide every layer's in_features. Engines have kernels for 32, 64 and 128."""
    symmetry: Literal["symmetric", "asymmetric"] = "symmetric"
    """symmetric: code 0 is a weight of zero; asymmetric: a zero point per group, and one byte stored per code."""

    @model_validator(mode="after")
    def _learned_is_symmetric(self) -> IntGroup:
        if self.scale == "learned" and self.symmetry == "asymmetric":
            raise ValueError("scale: learned is for symmetric codes; set symmetry: symmetric, or scale: absmax or mse")
        return self

    def num_bits(self) -> int:
        return self.bits

    def symmetric(self) -> bool:
        return self.symmetry == "symmetric"

    def label(self) -> str:
        extra = [*(["asymmetric"] if not self.symmetric() else []), *([self.scale] if self.scale != "absmax" else [])]
        return ", ".join([f"int{self.bits}", f"group {self.group_size}", *extra])

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {**super().compressed_tensors_arguments(), "strategy": "group", "group_size": self.group_size}

    def groups(self, in_features: int) -> int:
        """in_features / group_size.

        Raises:
            InputError: group_size does not divide in_features.
        """
        return count_groups(in_features, self.group_size)
