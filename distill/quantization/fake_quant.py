"""Fake-quantized layers: the forward uses the dequantized weight, and training updates the full-precision weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.inputs import HIGH, LOW, ActivationSpec

Held = tuple[Tensor, Tensor | None]
"""A fixed scale and zero point: see :mod:`distill.quantization.scales`."""
LARGE = 2**22
"""Weights that are quantized at once where a matrix has more of them."""


class _FakeQuantizeWeight(torch.autograd.Function):
    """Quantize and dequantize a weight; the backward is that of the quantizer, straight-through by default.

    A custom Function, because the usual ``w + (q - w).detach()`` has rounding errors and is not bitwise equal to ``q``.

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
        if weight.numel() > LARGE and spec.is_by_row and not spec.clips and log_scale is None and held is None:
            return _by_rows(weight, spec)
        codes = codes_of(weight, spec, log_scale, held)
        if spec.clips or held is not None:
            ctx.spec, ctx.held = spec, held is not None
            ctx.save_for_backward(weight, codes.scale, codes.zero_point)
        return spec.dequantize(codes).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, Any, None, None, None]:
        saved = ctx.saved_tensors  # read once: under gradient checkpointing each access recomputes them
        if not saved:
            return gradients[0], None, None, None, None
        to_weight, to_scale = ctx.spec.gradients(*saved, gradients[0])
        if not ctx.needs_input_grad[1]:
            return to_weight, None, None, None, None
        # zeros and not None: DDP waits for a gradient of every parameter
        return to_weight, (torch.zeros_like(to_scale) if ctx.held else to_scale).flatten(), None, None, None


def _by_rows(weight: Tensor, spec: QuantizerSpec) -> Tensor:
    """``dequantize(quantize(weight))`` of a vocabulary, some rows at a time: each step needs a tensor of their size."""
    out = torch.empty_like(weight)
    for rows, into in zip(*(t.split(LARGE // weight.shape[-1]) for t in (weight, out)), strict=True):
        into.copy_(spec.dequantize(spec.quantize(rows)))
    return out


def fake_quantize(
    weight: Tensor, spec: QuantizerSpec, log_scale: Tensor | None = None, held: Held | None = None
) -> Tensor:
    """``dequantize(quantize(weight))`` in the weight's own type, with the quantizer's gradient.

    Args:
        weight: [out_features, in_features].
        spec: the quantizer.
        log_scale: [out_features * groups], the logarithm of a learned scale; None: the scale is computed from the
            weight.
        held: fixed scale and zero point, which replace both.
    """
    return _FakeQuantizeWeight.apply(weight, log_scale, *(held or (None, None)), spec)


def codes_of(weight: Tensor, spec: QuantizerSpec, log_scale: Tensor | None, held: Held | None) -> Codes:
    """The codes whose dequantized values :func:`fake_quantize` returns."""
    if held is not None:
        return spec.quantize_on(weight, *held)
    return spec.quantize(weight, _scale(log_scale, weight))


def _scale(log_scale: Tensor | None, weight: Tensor) -> Tensor | None:
    """exp(log_scale) as [out_features, groups]; computed in fp64, so that all devices agree after rounding to fp32."""
    return None if log_scale is None else log_scale.detach().double().exp().float().view(len(weight), -1)


class _FakeQuant(nn.Module):
    """Base class of the fake-quantized layers, made by :func:`~distill.quantization.prepare.prepare`.

    The ``state_dict`` is that of the plain layer, with two additions. A quantizer that learns its scale adds
    ``log_scale``: one-dimensional, because optimizers do not decay vectors, and a logarithm, because a step of Adam
    then changes the scale by a fraction of itself. After scales are fixed (:mod:`distill.quantization.scales`), there
    are ``held_scale`` and ``held_zero_point``; the scale is stored as bytes, because ``model.to(dtype)`` would round
    it.

    Attributes:
        spec: the quantizer.
        enabled: False computes with the full-precision weight.
        is_end: whether it is an embedding or a head with a grid of its own or a shared weight, which gptq leaves alone.
        log_scale: [out_features * groups], or None.
        held_scale: uint8, [out_features, groups * 2], the bytes of a fixed scale, or None. A buffer.
        held_zero_point: int8, [out_features, groups], or None. A buffer.
    """

    weight: Tensor
    spec: QuantizerSpec
    enabled: bool
    is_end: bool
    log_scale: nn.Parameter | None
    held_scale: Tensor | None
    held_zero_point: Tensor | None

    def effective(self, weight: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """The weight that the forward uses instead of ``weight``: quantized and dequantized if ``enabled``.

        Args:
            weight: [out_features, in_features].
            log_scale: used instead of the layer's own, such as one that was gathered from all ranks.
        """
        log_scale = self.log_scale if log_scale is None else log_scale
        if self.enabled:
            return fake_quantize(weight, self.spec, log_scale, self.held())
        if log_scale is None or not torch.is_grad_enabled():
            return weight
        return weight + 0 * log_scale.sum()  # DDP waits for a gradient of every parameter

    def codes(self) -> Codes:
        """The codes to store; ``spec.dequantize`` of them is bitwise equal to the weight that the forward uses."""
        return codes_of(self.weight, self.spec, self.log_scale, self.held())

    def held(self) -> Held | None:
        """The fixed scale and zero point, or None if they are not fixed."""
        if self.held_scale is None:
            return None
        return self.held_scale.view(getattr(torch, self.spec.scale_dtype)), self.held_zero_point

    def hold(self, codes: Codes) -> None:
        """Fix the scale and the zero point to those of these codes."""
        self.held_scale = codes.scale.contiguous().clone().view(torch.uint8)
        self.held_zero_point = codes.zero_point

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.spec.kind}"


class _FakeQuantizeInput(torch.autograd.Function):
    """Quantize and dequantize a layer's input; the gradient is straight-through inside the range and 0 outside."""

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
    return _FakeQuantizeInput.apply(input, scale)


class InputQuantLinear(nn.Linear):
    """A linear layer that quantizes its input.

    Attributes:
        inputs: the activation quantizer, or None to use the input as it is.
        input_scale: [1], the scale of a calibrated activation quantizer, or None. A buffer.
        enabled: False computes in full precision.
    """

    inputs: ActivationSpec | None
    input_scale: Tensor | None
    enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return functional.linear(self.rounded(input), self.weight, self.bias)

    def rounded(self, input: Tensor) -> Tensor:
        """The quantized and dequantized input."""
        if self.inputs is None or not self.enabled:
            return input
        return self.inputs.quantize(input, self.input_scale)


class FakeQuantLinear(_FakeQuant, InputQuantLinear):
    """A linear layer with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.multiply(input, self.weight)

    def multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        """:meth:`forward` with ``weight`` instead of the layer's own weight, such as one with a merged adapter."""
        return functional.linear(self.rounded(input), self.effective(weight), self.bias)


class FakeQuantEmbedding(_FakeQuant, nn.Embedding):
    """An embedding with a fake-quantized weight. Only the rows that are looked up are quantized.

    A subclass of ``nn.Embedding``, such as Gemma's, which scales what it looks up, keeps its forward: see
    :func:`fake_quant_embedding`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]."""
        if not self.spec.is_by_row:
            return functional.embedding(input, self.effective(self.weight), self.padding_idx)
        rows = functional.embedding(input, self.weight, self.padding_idx)  # [..., embedding_dim]
        if not self.enabled:
            return rows if self.log_scale is None or not torch.is_grad_enabled() else rows + 0 * self.log_scale.sum()
        index, held = input.flatten(), self.held()  # index: [tokens]
        log_scale: Tensor | None = None
        if self.log_scale is not None:
            log_scale = self.log_scale.view(len(self.weight), -1)[index].flatten()  # [tokens * groups]
        if held is not None:
            held = (held[0][index], None if held[1] is None else held[1][index])
        return fake_quantize(rows.flatten(0, -2), self.spec, log_scale, held).view_as(rows)


@cache
def fake_quant_embedding(plain: type[nn.Embedding]) -> type[FakeQuantEmbedding]:
    """The fake-quantized class of a class of embeddings, whose own forward must call ``nn.Embedding``'s."""
    if plain is nn.Embedding:
        return FakeQuantEmbedding
    return type(f"FakeQuant{plain.__name__}", (plain, FakeQuantEmbedding), {"__module__": __name__, "plain": plain})


FakeQuantLayer = FakeQuantLinear | FakeQuantEmbedding


def fake_quant_layers(model: nn.Module) -> dict[str, FakeQuantLayer]:
    """Dotted name -> layer, of every fake-quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLayer)}


def quantizer_tensors(model: nn.Module) -> set[str]:
    """Names in the ``state_dict`` that exist only for fake quantization, and are not part of an exported model."""
    return {
        f"{name}.{leaf}"
        for name, layer in fake_quant_layers(model).items()
        for leaf in ("log_scale", "input_scale", "held_scale", "held_zero_point")
        if getattr(layer, leaf, None) is not None
    }


def rounds_cache(module: nn.Module) -> bool:
    """Whether the module is an attention layer that quantizes its keys and values."""
    return hasattr(module, "kv_cache_type")


def switch(model: nn.Module, *, enabled: bool) -> None:
    """Enable or disable the quantization of weights, layer inputs, keys and values in the whole model."""
    for layer in _switched(model):
        layer.enabled = enabled


def _switched(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, FakeQuantLayer) or rounds_cache(m)]


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model computes in full precision, for example as its own teacher without a copy."""
    before = {layer: layer.enabled for layer in _switched(model)}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
