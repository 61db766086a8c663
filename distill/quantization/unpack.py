"""Conversion of a model with packed compressed-tensors weights, as transformers loads it, to plain layers."""

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
    """Replace packed weights by the dequantized weights, in place; a model without packed weights is not changed.

    Transformers leaves compressed-tensors weights packed until the first forward of the full model. Before that,
    ``model.base_model`` cannot run; after that, scales and shapes are parameters of the model and are saved with it.
    This function unpacks at once and leaves plain linear layers, or linear layers that quantize their input. Load the
    model in fp32, because the product of code and scale is rounded to the type in which the model was loaded.

    It does not import the compressed-tensors library: transformers' loader attaches the decompressor to the model.

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
    # one-byte codes have the name of the weight, but are not dequantized yet
    if any(not _is_weight(module) for module in layers.values()):
        compressor.decompress_model(model)
    for module in layers.values():
        _make_plain(module)
    for module in model.modules():
        _remove_dispatch_wrappers(module)
    quantizer.remove_quantization_config(model)
    _tie(model)
    return list(layers)


def _tie(model: Any) -> None:
    """Make tied weights one parameter again: each module has dequantized the shared codes for itself."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        layer, _, leaf = name.rpartition(".")
        weight, shared = model.get_submodule(layer)._parameters[leaf], model.get_parameter(source)
        if weight is not shared and torch.equal(weight, shared):
            model.get_submodule(layer)._parameters[leaf] = shared


def _is_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _make_plain(module: nn.Module) -> None:
    """Keep only the weight, the bias and the quantization of the input; parameters become trainable."""
    arguments = cast(Any, module).quantization_scheme.input_activations
    scale = getattr(module, "input_scale", None)
    for name in [*module._parameters, *module._buffers]:
        if name.startswith(("weight_", "input_")):
            delattr(module, name)
    if arguments is not None:
        _quantize_input_of(module, arguments, scale)
    if isinstance(module, nn.Embedding):  # the decompressor makes parameters of its buffers, such as Gemma's scale
        for name in [name for name in (*module._parameters, *module._buffers) if name != "weight"]:
            tensor = getattr(module, name).detach()
            delattr(module, name)
            module.register_buffer(name, tensor, persistent=False)
    for name in ("quantization_scheme", "quantization_status", "forward"):
        module.__dict__.pop(name, None)
    module.requires_grad_(True)


def _remove_dispatch_wrappers(module: nn.Module) -> None:
    """Remove the wrappers that the decompressor adds to every module to move tensors; tracers cannot follow them."""
    if module.__dict__.pop("_original_forward_func", None) is not None:
        module.__dict__.pop("forward", None)
    module.__dict__.pop("is_staged", None)
    for name in ("_parameters", "_buffers"):
        module.__dict__[name] = dict(module.__dict__[name])


def _quantize_input_of(module: nn.Module, arguments: Any, scale: torch.Tensor | None) -> None:
    """Make the module quantize its input as its compressed-tensors arguments say.

    Raises:
        InputError: no activation quantizer corresponds to the arguments.
    """
    kind = (arguments.type, arguments.num_bits, arguments.symmetric, arguments.strategy)
    grids = {(True, "token"): DynamicInt8(), (False, "tensor"): StaticInt8()}
    grid = grids.get((bool(arguments.dynamic), str(arguments.strategy)))
    if grid is None or kind[:3] != ("int", 8, True):
        raise InputError(
            f"the model's activations are quantized in an unsupported way ({arguments}); "
            "expected symmetric int8, dynamic per token or static per tensor"
        )
    module.__class__ = InputQuantLinear
    layer = cast(InputQuantLinear, module)
    layer.enabled = True
    quantize_input(layer, grid)
    if scale is not None and layer.input_scale is not None:
        layer.input_scale = scale.detach().float().reshape(1)
