"""A model folder's weights as they are stored: low-bit layers as codes, everything else as the tensor in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.exporters.compressed_tensors import INT8, PACKED, PLAIN
from distill.models.size import weight_map
from distill.quantization.base import Codes

if TYPE_CHECKING:
    from torch import Tensor


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor | Codes]]:
    """(name, weight) of every weight of a folder, one in memory at a time, in the order of the names.

    A low-bit layer's is its :class:`~distill.quantization.base.Codes`: what it was trained with, without a product that
    somebody would have to take apart again.

    Raises:
        InputError: there are no safetensors, or low-bit weights in a format that this does not take apart.
    """
    from safetensors import safe_open

    files = {key: file for file in _weight_files(folder) for key in _keys(file)}
    bits = bits_of(folder)
    opened: dict[Path, Any] = {}

    def read(key: str) -> Tensor:
        file = files[key]
        if file not in opened:
            opened.clear()  # one shard mapped at a time
            opened[file] = safe_open(str(file), framework="pt")
        return opened[file].get_tensor(key)

    for key in sorted(files):
        layer, _, leaf = key.rpartition(".")
        if layer not in bits:
            yield key, read(key)
        elif leaf in ("weight_packed", "weight"):
            yield f"{layer}.weight", _codes(folder, layer, leaf, bits[layer], read, set(files))
        elif not leaf.startswith(("weight_", "input_")):
            yield key, read(key)


def bits_of(folder: Path) -> dict[str, int]:
    """Dotted name -> bits of a code, of every layer whose stored weights are low-bit; empty when none are.

    Raises:
        InputError: they are in another format than the one that ``save`` writes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from distill.models.load import load_config, low_bit_scheme, without_bars

    config = load_config(str(folder))
    if not low_bit_scheme(config):
        return {}
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    scheme = {key: value for key, value in dict(config.quantization_config).items() if key != "quant_method"}
    method = config.quantization_config.get("quant_method")
    formats = {scheme.get("format"), *(group.get("format") for group in scheme.get("config_groups", {}).values())}
    if method != "compressed-tensors" or not formats - {None} <= {PACKED, PLAIN, INT8, "mixed-precision"}:
        raise InputError(
            f"{folder}: its low-bit weights are {method} {', '.join(sorted(map(str, formats)))}, whose codes cannot be "
            f"written elsewhere (expected compressed-tensors {PACKED}, {PLAIN} or {INT8})"
        )
    del config.quantization_config  # the plain model's names are wanted, without weights
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with without_bars(str(folder)):
        apply_quantization_config(model, QuantizationConfig.model_validate(scheme))
    layers = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    return {name: found.weights.num_bits for name, found in layers.items() if found is not None and found.weights}


def _codes(folder: Path, layer: str, leaf: str, bits: int, read: Any, keys: set[str]) -> Codes:
    from compressed_tensors.compressors import unpack_from_int32

    if f"{layer}.weight_g_idx" in keys:
        raise InputError(f"{folder}: {layer}: its codes are reordered (weight_g_idx), and cannot be written elsewhere")
    stored = read(f"{layer}.{leaf}")
    if leaf == "weight_packed":
        import torch

        stored = unpack_from_int32(stored, bits, torch.Size(read(f"{layer}.weight_shape").tolist()))
    zero_point = f"{layer}.weight_zero_point"
    return Codes(stored, read(f"{layer}.weight_scale"), read(zero_point) if zero_point in keys else None)


def _weight_files(folder: Path) -> list[Path]:
    if (homes := weight_map(folder)) is not None:
        return [folder / name for name in sorted(set(homes.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no *.safetensors in it")
    return files


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())
