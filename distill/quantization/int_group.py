"""Integer weights of 2 to 8 bits, one scale a group of input channels: 0.28 of the size of bfloat16 at 4 bits by 32.

    w_oi ~ scale_og * (code_oi - zero_og),   code_oi in [-2^(bits-1), 2^(bits-1) - 1]

Prefer it when memory is what counts, and train on it: rounding alone costs a small model much. Smaller groups follow
the weight more closely and store more scales: (bits + 16 / group_size) bits a weight. Asymmetric codes reach further
where a group's weights lie to one side of zero, which trained weights seldom do: worth it at 2 and 3 bits at most.

Source: Frantar et al. 2022, arXiv 2210.17323, section 4 (grouping); the grid is that of compressed-tensors, see
:mod:`distill.quantization.integer`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distill.quantization.base import count_groups
from distill.quantization.integer import IntegerSpec


class IntGroup(IntegerSpec):
    """Integer weights of 2 to 8 bits with one scale a group of neighbouring input channels."""

    kind: Literal["int_group"] = "int_group"
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    """Width of a code. Engines have kernels for 4 and 8; the others save disk and transfer."""
    group_size: int = Field(32, ge=8)
    """Weights that share a scale; must divide every layer's in_features. Engines have kernels for 32, 64 and 128."""
    symmetry: Literal["symmetric", "asymmetric"] = "symmetric"
    """Whether code 0 stands for a weight of zero, or every group has a zero point of its own (stored a byte a code)."""

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
