"""The interface of an activation quantizer: int8 codes of a layer's input, as the int8 kernels of engines use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from distill.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

LOW, HIGH = -128, 127
STEPS = (HIGH - LOW) / 2
"""The scale is the largest magnitude divided by this, as in compressed-tensors."""


class ActivationSpec(Spec):
    """Base class of the activation quantizers."""

    calibrated: ClassVar[bool] = False
    """Whether the scale is computed by calibration and stored in the layer as ``input_scale``."""

    kind: str

    def label(self) -> str:
        """Short text for tables."""
        raise NotImplementedError

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        """The arguments of compressed-tensors' ``QuantizationArgs`` that describe the grid."""
        raise NotImplementedError

    def quantize(self, input: Tensor, scale: Tensor | None) -> Tensor:
        """Quantize and dequantize an input, in its own type; the gradient is straight-through inside the range.

        Args:
            input: [..., in_features].
            scale: [1] if the quantizer is ``calibrated``, else None.
        """
        raise NotImplementedError
