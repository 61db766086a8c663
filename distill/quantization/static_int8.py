"""Static int8 activations: one scale per layer, computed on the calibration set before training.

    scale = range / 127.5,   x ~ scale * clamp(round(x / scale), -128, 127)

Prefer it to :mod:`dynamic_int8 <distill.quantization.dynamic_int8>` only if the engine needs constant scales, because
outliers in a few tokens widen the range for all tokens. The range is the largest magnitude in the calibration set
(``minmax``), a moving average of the largest magnitude per sequence (``moving_average``), the 99.9th percentile
(``percentile``), or the range with the least squared error (``mse``). Training does not change the scale.

Source: Jacob et al. 2017, arXiv 1712.05877, section 3.1 (moving averages); Wu et al. 2020, arXiv 2004.09602, section
5.2 (percentiles); the grid is that of compressed-tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.inputs import ActivationSpec

if TYPE_CHECKING:
    from torch import Tensor


class StaticInt8(ActivationSpec):
    """int8 activations with one scale per layer, from the calibration set."""

    calibrated: ClassVar[bool] = True

    kind: Literal["static_int8"] = "static_int8"
    observer: Literal["minmax", "moving_average", "percentile", "mse"] = "mse"
    """How the range is computed from the activations of the calibration set."""

    def label(self) -> str:
        return f"int8 activations, {self.observer}"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}

    def quantize(self, input: Tensor, scale: Tensor | None) -> Tensor:
        from distill.quantization.fake_quant import round_input

        assert scale is not None
        return round_input(input, scale)
