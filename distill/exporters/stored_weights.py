"""Reads the weights of a model folder as they are stored: low-bit layers as codes, all others as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.exporters.compressed_tensors import INT8, PACKED, PLAIN
from distill.models.load import load_config, low_bit_scheme, without_bars
from distill.models.size import weight_files
from distill.models.weight_files import opened_weights
from distill.pretrained import model_of
from distill.quantization.base import Codes


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor | Codes]]:
    """(name, weight) of every weight of a folder, sorted by name, with one weight in memory at a time.

    The weight of a low-bit layer is its :class:`~distill.quantization.base.Codes`, and not the dequantized tensor.

    Raises:
        InputError: there are no safetensors, or the low-bit weights are in an unsupported format.
    """
    files = {key: file for file in weight_files(folder) for key in _keys(file)}
    bits = bits_of(folder)
    opened: dict[Path, Any] = {}

    def read(key: str) -> Tensor:
        file = files[key]
        if file not in opened:
            opened.clear()  # one shard mapped at a time
            opened[file] = opened_weights(file)
        return opened[file].get_tensor(key)

    for key in stoppable(sorted(files)):
        layer, _, leaf = key.rpartition(".")
        if layer not in bits:
            yield key, read(key)
        elif leaf in ("weight_packed", "weight"):
            yield f"{layer}.weight", _codes(folder, layer, leaf, bits[layer], read, set(files))
        elif not leaf.startswith(("weight_", "input_")):
            yield key, read(key)


def bits_of(folder: Path) -> dict[str, int]:
    """Dotted name -> bits per code of every layer with low-bit weights; empty if there are none.

    Raises:
        InputError: the format is not one of those that :func:`distill.exporters.compressed_tensors.save` writes.
    """
    config = load_config(str(folder))
    if not low_bit_scheme(config):
        return {}
    scheme = {key: value for key, value in dict(config.quantization_config).items() if key != "quant_method"}
    method = config.quantization_config.get("quant_method")
    formats = {scheme.get("format"), *(group.get("format") for group in scheme.get("config_groups", {}).values())}
    if method != "compressed-tensors" or not formats - {None} <= {PACKED, PLAIN, INT8, "mixed-precision"}:
        raise InputError(
            f"{folder}: the format of its low-bit weights, {method} {', '.join(sorted(map(str, formats)))}, cannot be "
            f"converted (expected compressed-tensors {PACKED}, {PLAIN} or {INT8})"
        )
    del config.quantization_config  # build the plain model, without weights, for the names of its layers
    with torch.device("meta"):
        model = model_of(config, AutoModelForCausalLM)
    with without_bars(str(folder)):
        apply_quantization_config(model, QuantizationConfig.model_validate(scheme))
    layers = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    return {name: found.weights.num_bits for name, found in layers.items() if found is not None and found.weights}


def _codes(folder: Path, layer: str, leaf: str, bits: int, read: Any, keys: set[str]) -> Codes:
    if f"{layer}.weight_g_idx" in keys:
        raise InputError(f"{folder}: {layer}: its codes are reordered (weight_g_idx), which cannot be converted")
    stored = read(f"{layer}.{leaf}")
    if leaf == "weight_packed":
        stored = unpack_from_int32(stored, bits, torch.Size(read(f"{layer}.weight_shape").tolist()))
    zero_point = f"{layer}.weight_zero_point"
    return Codes(stored, read(f"{layer}.weight_scale"), read(zero_point) if zero_point in keys else None)


def _keys(file: Path) -> list[str]:
    with opened_weights(file) as opened:
        return list(opened.keys())
