"""From a prepared model to what is shipped: low-bit codes, and the rest rounded to its stored type."""

from __future__ import annotations

import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization.base import Codes
from distill.quantization.fake_quant import fake_quant_layers, quantizer_tensors


@torch.no_grad()
def convert(model: nn.Module) -> dict[str, Codes]:
    """The codes of every fake-quantized layer; ``spec.dequantize`` of them is, bit for bit, what its forward uses.

    The model is not changed. Merge adapters first, on the device on which they were trained: the product of an adapter
    may round otherwise elsewhere.

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
            raise InputError(f"{name}: the weight has values that are not finite; the training has diverged")
    return {name: layer.codes() for name, layer in layers.items()}


@torch.no_grad()
def round_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all that is not quantized to the type in which it will be stored, in place; tensors keep their type.

    Embeddings, norms, biases and skipped layers are shipped in ``dtype``. After this the model in memory computes with
    the values that are in the file, and the two can be compared exactly. The full-precision weights below the codes
    are left alone: the codes are made from them.

    Raises:
        InputError: a value is too large for ``dtype``.
    """
    quantized = {f"{name}.weight" for name in fake_quant_layers(model)} | quantizer_tensors(model)
    for name, tensor in model.state_dict().items():
        if name not in quantized and tensor.is_floating_point():
            rounded = tensor.to(dtype)
            if not rounded.isfinite().all():
                raise InputError(f"{name}: a value does not fit {dtype} or is not finite; store the model as float32")
            tensor.copy_(rounded)
