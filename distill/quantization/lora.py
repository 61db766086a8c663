"""LoRA on fake-quantized layers: training quantizes the merged weight, which is the weight that is stored."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.quantization.fake_quant import FakeQuantLinear


def absorb_lora(model: nn.Module) -> list[str]:
    """Apply adapters before quantization, in place: ``y = quantized(W + scaling * B @ A) x``.

    The usual form, ``quantized(W) x + scaling * B A x``, cannot be merged without a change, because the sum is not on
    the grid. Here the merge changes nothing: ``W + delta`` is computed as in peft's ``merge_and_unload``
    (``safe_merge=False``), so the forward of the merged model is bitwise equal. Adapters on other layers are not
    changed. The function recognises peft's layers by their attributes and does not import peft.

    Returns:
        Dotted names of the adapted layers.

    Raises:
        InputError: no adapter is on a fake-quantized layer, or one has dropout or a bias or is a variant (DoRA...).
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), FakeQuantLinear)
    }
    if not layers:
        raise InputError(
            "no adapter is on a fake-quantized layer; call prepare first, then add adapters, then call absorb_lora"
        )
    for name, layer in layers.items():
        for adapter in layer.lora_A:
            _refuse(name, layer, adapter)
    for layer in layers.values():
        layer.forward = MethodType(_forward, layer)
    return list(layers)


def merged_weight(layer: Any) -> Tensor:
    """The weight of a peft layer after a merge, with gradients: [out_features, in_features]."""
    weight = layer.base_layer.weight
    if layer.merged:
        return weight
    # without autocast, which would compute B @ A in half precision; the later merge runs without it
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = (weight + layer.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the forward of a peft layer."""
    if kwargs.get("adapter_names") is not None:
        raise InputError("a fake-quantized layer cannot use several adapters in one batch; use one adapter per batch")
    if self.disable_adapters:
        if self.merged:
            self.unmerge()
        return self.base_layer(x)
    return self.base_layer.multiply(x, merged_weight(self))


def _refuse(name: str, layer: Any, adapter: str) -> None:
    """Raise for options of an adapter that a merged weight cannot represent."""
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    if dropout:
        raise InputError(f"{name}: lora dropout ({dropout}) has no effect on a fake-quantized layer; set it to 0")
    if adapter in getattr(layer, "lora_variant", {}):
        variant = type(layer.lora_variant[adapter]).__name__
        raise InputError(f"{name}: adapter variant {variant} cannot be fake-quantized; use plain LoRA")
    if getattr(layer, "lora_bias", {}).get(adapter):
        raise InputError(f"{name}: lora_bias is not part of the weight and cannot be fake-quantized; set it to false")
