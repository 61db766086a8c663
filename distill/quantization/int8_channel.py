"""int8 weights with one scale per output channel: half the size of bfloat16 with almost no loss.

    scale_o = max_i |w_oi| / 127.5,   w_oi ~ scale_o * clamp(round(w_oi / scale_o), -128, 127)

Prefer it if quality must not change; :mod:`int_group <distill.quantization.int_group>` at 4 bits halves the size again.

Source: Jacob et al. 2017, arXiv 1712.05877, section 2.1 (there affine); the symmetric form is compressed-tensors'.
"""

from __future__ import annotations

from typing import Any, Literal

from distill.quantization.integer import IntegerSpec


class Int8Channel(IntegerSpec):
    """Symmetric int8 weights with one scale per output channel."""

    kind: Literal["int8_channel"] = "int8_channel"

    def num_bits(self) -> int:
        return 8

    def label(self) -> str:
        return "int8, per channel" + ("" if self.scale == "absmax" else f", {self.scale}")

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {**super().compressed_tensors_arguments(), "strategy": "channel"}

    def groups(self, in_features: int) -> int:
        """One, whatever the width."""
        return 1
