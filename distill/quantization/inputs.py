"""The contract of a grid for activations: int8 codes of a layer's input, as an engine's int8 kernels read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from distill.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

LOW, HIGH = -128, 127
STEPS = (HIGH - LOW) / 2
"""Steps from zero to the end of the range: the scale is the largest magnitude over this, as in compressed-tensors."""


class ActivationSpec(Spec):
    """What every grid for activations has: a kind, and where its scale is from."""

    calibrated: ClassVar[bool] = False
    """Whether a layer holds a scale of its inputs, ``input_scale``, that calibration finds."""

    kind: str

    def label(self) -> str:
        """A few words for tables."""
        raise NotImplementedError

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        """The grid in the words of compressed-tensors' ``QuantizationArgs``."""
        raise NotImplementedError

    def quantize(self, input: Tensor, scale: Tensor | None) -> Tensor:
        """The input's nearest point on the grid, in its own type; the gradient passes inside the range.

        Args:
            input: [..., in_features].
            scale: [1] where the grid is ``calibrated``, else None.
        """
        raise NotImplementedError
