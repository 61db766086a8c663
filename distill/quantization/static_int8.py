"""int8 activations, with one scale a layer that is found on the calibration set before anything is trained.

    scale = range / 127.5,   x ~ scale * clamp(round(x / scale), -128, 127)

Prefer it over :mod:`dynamic_int8 <distill.quantization.dynamic_int8>` only where the engine wants constants: outliers
of a few tokens widen the grid for all. The range is the largest magnitude of the calibration set (``minmax``), a
running mean of the sequences' largest magnitudes (``moving_average``), the magnitude that all but 0.1 % stay below
(``percentile``), or the one with the least squared error (``mse``). Training adapts to the scale, which stays.

Source: Jacob et al. 2017, arXiv 1712.05877, section 3.1 (moving averages); Wu et al. 2020, arXiv 2004.09602, section
5.2 (percentiles); the grid is that of compressed-tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.quantization.inputs import ActivationSpec

if TYPE_CHECKING:
    from torch import Tensor


class StaticInt8(ActivationSpec):
    """int8 activations with one scale a layer, from the calibration set."""

    calibrated: ClassVar[bool] = True

    kind: Literal["static_int8"] = "static_int8"
    observer: Literal["minmax", "moving_average", "percentile", "mse"] = "mse"
    """How the range follows from the activations of the calibration set."""

    def label(self) -> str:
        return f"int8 activations, {self.observer}"

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}

    def quantize(self, input: Tensor, scale: Tensor | None) -> Tensor:
        from distill.quantization.fake_quant import round_input

        assert scale is not None
        return round_input(input, scale)
