"""Dynamic int8 activations: one scale per token, computed at run time.

    scale_t = max_i |x_ti| / 127.5,   x_ti ~ scale_t * clamp(round(x_ti / scale_t), -128, 127)

Prefer it for int8 activations: it needs no calibration, and an outlier affects only its own token. With int8 weights
this is W8A8 dynamic in vLLM.

Source: Yao et al. 2022, arXiv 2206.01861, section 4.1 (token-wise activations); the grid is that of compressed-tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.quantization.inputs import STEPS, ActivationSpec

if TYPE_CHECKING:
    from torch import Tensor


class DynamicInt8(ActivationSpec):
    """int8 activations with one scale per token, computed at run time."""

    kind: Literal["dynamic_int8"] = "dynamic_int8"

    def label(self) -> str:
        return "int8 activations, dynamic"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}

    def quantize(self, input: Tensor, scale: Tensor | None) -> Tensor:
        from distill.quantization.fake_quant import round_input

        scale = input.detach().float().abs().amax(-1, keepdim=True)  # [..., 1]
        scale = scale / scale.new_full((), STEPS)
        return round_input(input, scale.masked_fill(scale == 0, 1.0))
