"""Weights and arithmetic in bf16, with the rotary frequencies kept in fp32."""

from __future__ import annotations

from pytorch_lightning.plugins.precision import HalfPrecision
from torch import nn

FREQUENCIES = "inv_freq"
"""End of the names of the buffers that hold rotary frequencies."""


class HalfWeights(HalfPrecision):
    """Lightning's ``bf16-true``, but rotary frequencies stay in fp32.

    Lightning also rounds buffers to bf16. bf16 has 8 bits of precision, so frequency times position is wrong by many
    radians in long rows: the cosine at position 1024 has an error of 0.9. A model that is loaded in bf16 has its
    frequencies in fp32, and so has the exported model.
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
