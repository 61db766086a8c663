"""Layers that compute with the weight that will be shipped while the full-precision weight is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.inputs import HIGH, LOW, ActivationSpec

Held = tuple[Tensor, Tensor | None]
"""A scale and a zero point that stay: see :mod:`distill.quantization.scales`."""


class _OnGrid(torch.autograd.Function):
    """The weight on its grid going forward, the gradient of the grid going back: straight through, if it says no more.

    An own Function, because ``w + (q - w).detach()`` rounds and is no longer ``q``.

    Source: Bengio et al. 2013, arXiv 1308.3432, section 4.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor | None,
        held_scale: Tensor | None,
        held_zero_point: Tensor | None,
        spec: QuantizerSpec,
    ) -> Tensor:
        held = None if held_scale is None else (held_scale, held_zero_point)
        codes = codes_of(weight, spec, log_scale, held)
        if spec.clips or held is not None:
            ctx.spec, ctx.held = spec, held is not None
            ctx.save_for_backward(weight, codes.scale, codes.zero_point)
        return spec.dequantize(codes).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, Any, None, None, None]:
        saved = ctx.saved_tensors  # to be read once: under gradient checkpointing it computes them
        if not saved:
            return gradients[0], None, None, None, None
        to_weight, to_scale = ctx.spec.gradients(*saved, gradients[0])
        if not ctx.needs_input_grad[1]:
            return to_weight, None, None, None, None
        # zeros, not nothing: DDP waits for a gradient of every parameter
        return to_weight, (torch.zeros_like(to_scale) if ctx.held else to_scale).flatten(), None, None, None


def fake_quantize(
    weight: Tensor, spec: QuantizerSpec, log_scale: Tensor | None = None, held: Held | None = None
) -> Tensor:
    """``dequantize(quantize(weight))`` with the grid's gradient, in the weight's own type.

    Args:
        weight: [out_features, in_features].
        spec: the grid.
        log_scale: [out_features * groups], the logarithm of a learned scale; None: the weight's own scale.
        held: scale and zero point of earlier codes, which take the place of either.
    """
    return _OnGrid.apply(weight, log_scale, *(held or (None, None)), spec)


def codes_of(weight: Tensor, spec: QuantizerSpec, log_scale: Tensor | None, held: Held | None) -> Codes:
    """The codes that :func:`fake_quantize` stands on."""
    if held is not None:
        return spec.quantize_on(weight, *held)
    return spec.quantize(weight, _scale(log_scale, weight))


def _scale(log_scale: Tensor | None, weight: Tensor) -> Tensor | None:
    """In fp64, whose last bit devices may round differently without changing the scale as it is stored."""
    return None if log_scale is None else log_scale.detach().double().exp().float().view(len(weight), -1)


class _FakeQuant(nn.Module):
    """What fake-quantized layers of every kind share.

    Parameters, names and ``state_dict`` are those of the layer that it stands for, with ``log_scale`` more where the
    grid learns its scale: a vector, so that no optimizer decays it, and a logarithm, so that a step of Adam is a share
    of the scale, however small that is. Once scales are held, these are there as well: as bytes, which no cast of a
    model to another type rounds. Made by :func:`~distill.quantization.prepare.prepare`, not by hand.

    Attributes:
        spec: the grid.
        enabled: False computes with the full-precision weight.
        log_scale: [out_features * groups], or None.
        held_scale: uint8, [out_features, groups * 2], the bytes of a scale that stays; or None. A buffer.
        held_zero_point: int8, [out_features, groups], or None. A buffer.
    """

    weight: Tensor
    spec: QuantizerSpec
    enabled: bool
    log_scale: nn.Parameter | None
    held_scale: Tensor | None
    held_zero_point: Tensor | None

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that is multiplied by in place of ``weight``."""
        if self.enabled:
            return fake_quantize(weight, self.spec, self.log_scale, self.held())
        if self.log_scale is None or not torch.is_grad_enabled():
            return weight
        return weight + 0 * self.log_scale.sum()  # DDP waits for a gradient of every parameter

    def codes(self) -> Codes:
        """What is shipped: ``spec.dequantize`` of it is, bit for bit, what the forward uses."""
        return codes_of(self.weight, self.spec, self.log_scale, self.held())

    def held(self) -> Held | None:
        """Scale and zero point that stay, if they do."""
        if self.held_scale is None:
            return None
        return self.held_scale.view(getattr(torch, self.spec.scale_dtype)), self.held_zero_point

    def hold(self, codes: Codes) -> None:
        """Keep the scale and the zero point of these codes, whatever the weight becomes."""
        self.held_scale = codes.scale.contiguous().clone().view(torch.uint8)
        self.held_zero_point = codes.zero_point

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.spec.kind}"


class _InputOnGrid(torch.autograd.Function):
    """An input on its grid going forward; the gradient passes inside the range."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor) -> Tensor:
        values = input.float() / scale.float()
        ctx.save_for_backward((values >= LOW - 0.5) & (values <= HIGH + 0.5))
        return (values.round().clamp(LOW, HIGH) * scale.float()).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def round_input(input: Tensor, scale: Tensor) -> Tensor:
    """``scale * clamp(round(input / scale), -128, 127)``, computed in fp32, in the input's own type.

    Args:
        input: [..., in_features].
        scale: broadcasts against it.
    """
    return _InputOnGrid.apply(input, scale)


class InputQuantLinear(nn.Linear):
    """A linear layer whose input is rounded, if ``inputs`` says how.

    Attributes:
        inputs: the grid of the input, or None.
        input_scale: [1], its scale where that is calibrated; a buffer.
        enabled: False computes in full precision.
    """

    inputs: ActivationSpec | None
    input_scale: Tensor | None
    enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return functional.linear(self.rounded(input), self.weight, self.bias)

    def rounded(self, input: Tensor) -> Tensor:
        """What is multiplied in place of ``input``."""
        if self.inputs is None or not self.enabled:
            return input
        return self.inputs.quantize(input, self.input_scale)


class FakeQuantLinear(_FakeQuant, InputQuantLinear):
    """A linear layer that multiplies by its weight's nearest point on a grid."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.multiply(input, self.weight)

    def multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`forward`, with another full-precision weight than the layer's own (with an adapter added, say)."""
        return functional.linear(self.rounded(input), self.effective(weight), self.bias)


class FakeQuantEmbedding(_FakeQuant, nn.Embedding):
    """An embedding whose rows lie on a grid."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]."""
        return functional.embedding(input, self.effective(self.weight), self.padding_idx)


FakeQuantLayer = FakeQuantLinear | FakeQuantEmbedding


def fake_quant_layers(model: nn.Module) -> dict[str, FakeQuantLayer]:
    """Dotted name -> layer, of every fake-quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLayer)}


def quantizer_tensors(model: nn.Module) -> set[str]:
    """Names in the ``state_dict`` that the model has for its quantization only, and that no file needs."""
    return {
        f"{name}.{leaf}"
        for name, layer in fake_quant_layers(model).items()
        for leaf in ("log_scale", "input_scale", "held_scale", "held_zero_point")
        if getattr(layer, leaf, None) is not None
    }


def rounds_cache(module: nn.Module) -> bool:
    """Whether it is an attention layer that was told to round keys and values."""
    return hasattr(module, "kv_cache_type")


def switch(model: nn.Module, *, enabled: bool) -> None:
    """Have every fake-quantized layer compute with quantized weights, or with the full-precision ones; keys and values
    likewise."""
    for layer in _switched(model):
        layer.enabled = enabled


def _switched(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, FakeQuantLayer) or rounds_cache(m)]


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes in full precision: its own teacher, without a second copy."""
    before = {layer: layer.enabled for layer in _switched(model)}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
