"""Linear layers that compute with the weight that will be shipped while the full-precision weight is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.quantization.base import QuantizerSpec


class _StraightThrough(torch.autograd.Function):
    """The weight on its grid going forward, the identity going back.

    With a scale from the absolute maximum no weight lies outside the range, so the gradient passes everywhere. An own
    Function, because ``w + (q - w).detach()`` rounds and is no longer ``q``.

    Source: Bengio et al. 2013, arXiv 1308.3432, section 4.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, spec: QuantizerSpec) -> Tensor:
        return spec.dequantize(spec.quantize(weight)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


def fake_quantize(weight: Tensor, spec: QuantizerSpec) -> Tensor:
    """``dequantize(quantize(weight))`` with a straight-through gradient, in the weight's own type.

    Args:
        weight: [out_features, in_features].
        spec: the grid.
    """
    return _StraightThrough.apply(weight, spec)


class FakeQuantLinear(nn.Linear):
    """A linear layer that multiplies by its weight's nearest point on a grid.

    Parameters, names and ``state_dict`` are those of the layer that it stands for. Made by
    :func:`~distill.quantization.prepare.prepare`, not by hand.

    Attributes:
        spec: the grid.
        enabled: False computes with the full-precision weight.
    """

    spec: QuantizerSpec
    enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.multiply(input, self.weight)

    def multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`forward`, with another full-precision weight than the layer's own (with an adapter added, say)."""
        return functional.linear(input, fake_quantize(weight, self.spec) if self.enabled else weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.spec.kind}"


def fake_quant_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """Dotted name -> layer, of every fake-quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes in full precision: its own teacher, without a second copy."""
    before = {layer: layer.enabled for layer in fake_quant_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
