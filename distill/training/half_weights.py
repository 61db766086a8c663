"""Weights and arithmetic in bf16, with the rotary frequencies kept in fp32."""

from __future__ import annotations

from pytorch_lightning.plugins.precision import HalfPrecision
from torch import nn

FREQUENCIES = "inv_freq"
"""End of the names of the buffers that hold rotary frequencies."""


class HalfWeights(HalfPrecision):
    """``bf16-true`` of Lightning, which would round the buffers as well.

    A position times a frequency of 8 bits is wrong by many radians in long rows: the cosine at position 1024 has an
    error of 0.9. Models that are read from a file in bf16 have their frequencies in fp32, and so has what is shipped.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast parameters and buffers, but not the frequencies."""
        kept = {
            (name, leaf): buffer
            for name, part in module.named_modules()
            for leaf, buffer in part._buffers.items()
            if buffer is not None and leaf.endswith(FREQUENCIES)
        }
        module = super().convert_module(module)
        for (name, leaf), buffer in kept.items():
            module.get_submodule(name)._buffers[leaf] = buffer
        return module
