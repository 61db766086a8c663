"""A packed model, as transformers loads it, turned into a plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def unpack(model: Any) -> list[str]:
    """Replace packed weights by the weights that they stand for, in place; a model without any is left alone.

    Transformers leaves compressed-tensors weights packed until the *whole model's* first forward: until then its body
    alone (``model.base_model``) cannot run, and ever after scales and shapes count as parameters and are saved again.
    This unpacks at once and leaves plain linear layers. Load the model in fp32 first: products of codes and scales are
    rounded to the type that it was loaded in.

    Needs no import of the packing library: transformers' loader hangs the unpacker on the model.

    Args:
        model: a transformers model.

    Returns:
        Dotted names of the layers; empty when nothing was packed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    compressor = getattr(quantizer, "compressor", None)
    if quantizer is None or compressor is None:
        return []
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    if any("weight" not in module._parameters for module in layers.values()):
        compressor.decompress_model(model)
    for module in layers.values():
        _strip(module)
    quantizer.remove_quantization_config(model)
    return list(layers)


def _strip(module: nn.Module) -> None:
    """Leave the weight and the bias only, trainable as in a model that was never packed."""
    for name in [*module._parameters, *module._buffers]:
        if name.startswith("weight_"):
            delattr(module, name)
    for name in ("quantization_scheme", "quantization_status", "forward"):
        module.__dict__.pop(name, None)
    module.requires_grad_(True)
