"""Conversion of a prepared model for storage: low-bit codes, and all other tensors rounded to their stored type."""

from __future__ import annotations

import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization.base import Codes
from distill.quantization.fake_quant import fake_quant_layers, quantizer_tensors


@torch.no_grad()
def convert(model: nn.Module) -> dict[str, Codes]:
    """The codes of every fake-quantized layer.

    ``spec.dequantize`` of them is bitwise equal to the weight that the layer's forward uses.
    The model is not changed. Merge adapters first, on the device on which they were trained, because the product of the
    adapter's matrices may round differently on another device.

    Returns:
        Dotted layer name -> codes.

    Raises:
        InputError: nothing is prepared, adapters are not merged, or a weight is not finite.
    """
    layers = fake_quant_layers(model)
    if not layers:
        raise InputError("the model has no fake-quantized layers; prepare it first")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InputError("the model still has adapters: merge them first (peft's merge_and_unload), then convert")
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise InputError(
                f"{name}: the weight contains NaN or infinity, so the training has diverged; lower optimizer.lr"
            )
    return {name: layer.codes() for name, layer in layers.items()}


@torch.no_grad()
def round_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the values of all tensors that are not quantized to ``dtype``, in place; their own type does not change.

    Embeddings, norms, biases and skipped layers are stored in ``dtype``. Afterwards the model in memory computes with
    the values of the file, so the two can be compared exactly. The full-precision weights of quantized layers are not
    rounded, because the codes are made from them.

    Raises:
        InputError: a value is outside the range of ``dtype``.
    """
    quantized = {f"{name}.weight" for name in fake_quant_layers(model)} | quantizer_tensors(model)
    for name, tensor in model.state_dict().items():
        if name not in quantized and tensor.is_floating_point():
            rounded = tensor.to(dtype)
            if not rounded.isfinite().all():
                raise InputError(
                    f"{name}: a value is not finite in {dtype}, in which it would be stored; store the model as float32"
                )
            tensor.copy_(rounded)
