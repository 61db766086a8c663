"""fp8 weights (e4m3) with one scale per output channel: half the size of bfloat16, with hardware support.

    scale_o = max_i |w_oi| / 448,   w_oi ~ scale_o * float8_e4m3(w_oi / scale_o)

Prefer it to :mod:`int8_channel <distill.quantization.int8_channel>` on GPUs with fp8 units (Ada, Hopper and later): a
floating-point grid represents small weights better if the same channel has a large one. On other hardware it only saves
memory.

Source: Micikevicius et al. 2022, arXiv 2209.05433, section 3 (the format); the grid is that of compressed-tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.base import Codes, QuantizerSpec

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""The largest number of e4m3."""


class Fp8(QuantizerSpec):
    """fp8 (e4m3) weights with one scale per output channel."""

    half_step: ClassVar[float] = 16.0

    kind: Literal["fp8"] = "fp8"

    def label(self) -> str:
        return "fp8, per channel"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}

    def groups(self, in_features: int) -> int:
        """One, whatever the width."""
        return 1

    def limits(self) -> tuple[float, float]:
        return -LARGEST, LARGEST

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        import torch

        exact = weight.detach().float()
        if scale is None:
            largest = exact.abs().amax(-1, keepdim=True)
            scale = largest / largest.new_full((), LARGEST)
        scale = scale.bfloat16()
        scale = scale.masked_fill(scale == 0, 1.0)
        # clamped first, because the cast turns larger values into NaN
        values = (exact / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return Codes(values, scale)
