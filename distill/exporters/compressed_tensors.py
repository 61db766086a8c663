"""Model folders with low-bit weights in compressed-tensors' formats, which transformers loads without distill.

The library's own packer packs integer codes into int32; fp8 codes are stored unpacked. The dequantized weights are
bitwise equal to those of the fake-quantized model. A loader casts scales to the type of the model in memory: fp32
represents every scale exactly, bfloat16 and float16 only scales that were rounded to that type.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.core.errors import InputError
from distill.quantization.base import Codes
from distill.quantization.convert import convert
from distill.quantization.fake_quant import FakeQuantLayer, FakeQuantLinear, fake_quant_layers, quantizer_tensors

PACKED, PLAIN, INT8 = "pack-quantized", "naive-quantized", "int-quantized"
"""Codes packed into int32; one byte per code; one byte per code for kernels with int8 inputs."""


@dataclass(frozen=True)
class PackedSize:
    """The size of a folder with low-bit weights.

    Attributes:
        layers: number of quantized layers.
        packed_bytes: their weights as stored: codes, scales and shapes.
        bfloat16_bytes: the same weights in bfloat16.
        total_bytes: all tensors of the folder.
    """

    layers: int
    packed_bytes: int
    bfloat16_bytes: int
    total_bytes: int

    @property
    def ratio(self) -> float:
        """packed_bytes / bfloat16_bytes."""
        return self.packed_bytes / self.bfloat16_bytes


def save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> PackedSize:
    """Write a prepared model as a Hugging Face folder with packed weights.

    The model is not changed. Tensors that are not quantized are stored in ``dtype``. If
    :func:`~distill.quantization.convert.round_unquantized` was called with the same type before, the folder, loaded in
    fp32, computes exactly what the model computes.

    Args:
        model: fake-quantized, with merged adapters.
        folder: target folder; created if it does not exist.
        tokenizer: saved in the same folder, if given.
        dtype: of embeddings, norms, biases and skipped layers: float32 or the type of the scales (default).

    Raises:
        InputError: the model is not prepared or has adapters, or the format cannot store ``dtype`` or a quantizer.
    """
    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise InputError(f"save: got {type(model).__name__}, expected a transformers model with its adapters merged")
    codes = convert(model)
    layers = fake_quant_layers(model)
    dtype = _dtype({layer.spec.scale_dtype for layer in layers.values()}, dtype)
    tied = _sharing(layers)
    schemes = {name: _scheme(layer, name in tied) for name, layer in layers.items()}
    packed = {name: _pack(codes[name], schemes[name], layer) for name, layer in layers.items()}
    for name, owner in tied.items():  # one tensor for both, which save_pretrained recognises; each has its own scales
        packed[name]["weight"] = packed[owner]["weight"]
    state = _state(model, packed, dtype)
    size = PackedSize(
        layers=len(codes),
        packed_bytes=_bytes_of(tensor for tensors in packed.values() for tensor in tensors.values()),
        bfloat16_bytes=sum(2 * c.values.numel() for name, c in codes.items() if tied.get(name, name) == name),
        total_bytes=_bytes_of(state.values()),
    )
    # with the names of the modules: transformers cannot fuse experts again when it loads a quantized folder
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    _write_config(model, schemes, folder, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return size


def _dtype(scales: set[str], wanted: torch.dtype | None) -> torch.dtype:
    """The type in which tensors that are not quantized are stored.

    Raises:
        InputError: the wanted type would round the scales again.
    """
    only = getattr(torch, scales.pop()) if len(scales) == 1 else torch.float32
    if wanted not in (None, only, torch.float32):
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys((only, torch.float32)))
        raise InputError(f"dtype: got {wanted}, expected {expected}; another type would round the scales again")
    return wanted or only


def _sharing(layers: dict[str, FakeQuantLayer]) -> dict[str, str]:
    """Layer -> the first layer that uses the same weight, for every layer of a shared weight."""
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(layer.weight), []).append(name)
    return {name: names[0] for names in owners.values() if len(names) > 1 for name in names}


def _scheme(layer: FakeQuantLayer, is_tied: bool) -> dict[str, Any]:
    """The compressed-tensors scheme of a layer: arguments of weights and inputs, and the format.

    Codes are one byte each where inputs are int8, because int8 kernels need that, and where transformers cannot load
    packed codes: with zero points (it allocates them in the unpacked shape), in embeddings, and in a tied head, whose
    codes are those of the embeddings. Transformers ties the codes as it ties plain weights.
    """
    weights, inputs = layer.spec.compressed_tensors_arguments(), getattr(layer, "inputs", None)
    if inputs is None:
        packs = weights["type"] == "int" and weights["symmetric"] and isinstance(layer, FakeQuantLinear) and not is_tied
        return {"weights": weights, "format": PACKED if packs else PLAIN}
    wide = weights["num_bits"] == 8 or not weights["symmetric"]
    activations = inputs.compressed_tensors_arguments()
    return {"weights": weights, "input_activations": activations, "format": INT8 if wide else PACKED}


def _pack(codes: Codes, scheme: dict[str, Any], layer: FakeQuantLayer) -> dict[str, Tensor]:
    """The tensors that store one layer's weight, and the scale of its inputs."""
    shared = {"weight_scale": codes.scale.contiguous()}
    if (input_scale := getattr(layer, "input_scale", None)) is not None:
        shared["input_scale"] = input_scale
    if scheme["format"] == PACKED:
        packed = pack_to_int32(codes.values, scheme["weights"]["num_bits"])  # [out, ceil(in * bits / 32)]
        return {"weight_packed": packed, **shared, "weight_shape": torch.tensor(codes.values.shape)}
    zero = {} if codes.zero_point is None else {"weight_zero_point": codes.zero_point.contiguous()}
    return {"weight": codes.values, **shared, **zero}


def _state(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict to store. Tied tensors remain one tensor, so that save_pretrained recognises the tie."""
    own = quantizer_tensors(model)
    state: dict[str, Tensor] = {}
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for key, tensor in model.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and layer in packed:
            state.update({f"{layer}.{name}": part for name, part in packed[layer].items()})
        elif key in own:
            continue
        elif tensor.is_floating_point():
            state[key] = cast.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
        else:
            state[key] = tensor
    for name, module in fake_quant_layers(model).items():  # the library makes all buffers of such a module persistent
        for leaf in module._non_persistent_buffers_set:  # such as the scale of Gemma's embeddings
            state[f"{name}.{leaf}"] = module.get_buffer(leaf).detach().clone()
    return state


def _write_config(model: PreTrainedModel, schemes: dict[str, dict[str, Any]], folder: Path, dtype: torch.dtype) -> None:
    """Add the type and the quantization to ``config.json``."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups = _config_groups(schemes, linear)
    formats = {group["format"] for group in groups}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": [name for name in linear if name not in schemes],
        }
    )
    file = Path(folder) / "config.json"
    text = json.loads(file.read_text(encoding="utf-8"))
    text["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(text), encoding="utf-8")
    ModelCompressor(quantization_config=config).update_config(str(folder))


def _config_groups(schemes: dict[str, dict[str, Any]], linear: list[str]) -> list[dict[str, Any]]:
    """Groups of layers with the same scheme; a single group that has only linear layers gets the target "Linear"."""
    layers: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        layers.setdefault(json.dumps(scheme), []).append(name)
    alike = len(layers) == 1 and set(schemes) <= set(linear)
    return [{"targets": ["Linear"] if alike else names, **json.loads(scheme)} for scheme, names in layers.items()]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; one that is there several times counts once."""
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())
