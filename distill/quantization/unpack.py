"""A packed model, as transformers loads it, turned into a plain one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization.dynamic_int8 import DynamicInt8
from distill.quantization.fake_quant import InputQuantLinear
from distill.quantization.prepare import quantize_input
from distill.quantization.static_int8 import StaticInt8


@torch.no_grad()
def unpack(model: Any) -> list[str]:
    """Replace packed weights by the weights that they stand for, in place; a model without any is left alone.

    Transformers leaves compressed-tensors weights packed until the *whole model's* first forward: until then its body
    alone (``model.base_model``) cannot run, and ever after scales and shapes count as parameters and are saved again.
    This unpacks at once and leaves plain linear layers, or such as round their input. Load the model in fp32 first:
    products of codes and scales are rounded to the type that it was loaded in.

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
    # codes of a byte each stand under the weight's own name, but are no weight yet
    if any(not _is_weight(module) for module in layers.values()):
        compressor.decompress_model(model)
    for module in layers.values():
        _strip(module)
    for module in model.modules():
        _let_go(module)
    quantizer.remove_quantization_config(model)
    return list(layers)


def _is_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _strip(module: nn.Module) -> None:
    """Leave the weight, the bias and the rounding of the input only, trainable as in a model never packed."""
    words = cast(Any, module).quantization_scheme.input_activations
    scale = getattr(module, "input_scale", None)
    for name in [*module._parameters, *module._buffers]:
        if name.startswith(("weight_", "input_")):
            delattr(module, name)
    if words is not None:
        _round_input(module, words, scale)
    for name in ("quantization_scheme", "quantization_status", "forward"):
        module.__dict__.pop(name, None)
    module.requires_grad_(True)


def _let_go(module: nn.Module) -> None:
    """Take away what the unpacker puts around every module to move its tensors about: no tracer can follow that."""
    if module.__dict__.pop("_original_forward_func", None) is not None:
        module.__dict__.pop("forward", None)
    module.__dict__.pop("is_staged", None)
    for name in ("_parameters", "_buffers"):
        module.__dict__[name] = dict(module.__dict__[name])


def _round_input(module: nn.Module, words: Any, scale: torch.Tensor | None) -> None:
    """The activations' grid as ours.

    Raises:
        InputError: it is none of ours.
    """
    kind = (words.type, words.num_bits, words.symmetric, words.strategy)
    grids = {(True, "token"): DynamicInt8(), (False, "tensor"): StaticInt8()}
    grid = grids.get((bool(words.dynamic), str(words.strategy)))
    if grid is None or kind[:3] != ("int", 8, True):
        raise InputError(f"the model's activations are quantized in a way that is not known here: {words}")
    module.__class__ = InputQuantLinear
    layer = cast(InputQuantLinear, module)
    layer.enabled = True
    quantize_input(layer, grid)
    if scale is not None and layer.input_scale is not None:
        layer.input_scale = scale.detach().float().reshape(1)
