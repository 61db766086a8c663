"""Low-bit model folders in compressed-tensors' formats, which transformers loads without our code.

Integer codes are packed into int32 words by the library's own packer, fp8 codes stand as they are, so the weight that a
loader unpacks is, bit for bit, the one that the fake-quantized model trained with. A loader casts scales to the type in
which it holds the model: fp32 keeps every scale, bfloat16 and float16 only those that were rounded to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.quantization.base import Codes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.quantization.fake_quant import FakeQuantLayer

PACKED, PLAIN, INT8 = "pack-quantized", "naive-quantized", "int-quantized"
"""Integer codes in words, and codes of a byte each, by themselves or for kernels with int8 inputs."""


@dataclass(frozen=True)
class PackedSize:
    """What packing saved.

    Attributes:
        layers: quantized layers.
        packed_bytes: their weights as stored: words, scales and shapes.
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

    The model is not changed. What is not quantized is stored in ``dtype``; call
    :func:`~distill.quantization.convert.round_unquantized` with the same type first and the folder, loaded in fp32,
    computes exactly what the model does.

    Args:
        model: fake-quantized, adapters merged.
        folder: where to; made if it is not there.
        tokenizer: saved beside the weights, if given.
        dtype: of embeddings, norms, biases and skipped layers: float32 or the type of the scales (default).

    Raises:
        InputError: the model is not prepared, has adapters, or the type or a grid cannot be stored.
    """
    from distill.quantization.convert import convert
    from distill.quantization.fake_quant import fake_quant_layers

    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise InputError(f"save: got {type(model).__name__}, expected a transformers model with its adapters merged")
    codes = convert(model)
    layers = fake_quant_layers(model)
    dtype = _dtype({layer.spec.scale_dtype for layer in layers.values()}, dtype)
    schemes = {name: _scheme(layer) for name, layer in layers.items()}
    packed = {name: _pack(codes[name], schemes[name], layer) for name, layer in layers.items()}
    state = _state(model, packed, dtype)
    size = PackedSize(
        layers=len(codes),
        packed_bytes=sum(_bytes(tensor) for tensors in packed.values() for tensor in tensors.values()),
        bfloat16_bytes=sum(2 * layer_codes.values.numel() for layer_codes in codes.values()),
        total_bytes=sum(_bytes(tensor) for tensor in {tensor.data_ptr(): tensor for tensor in state.values()}.values()),
    )
    # by the names of the modules: transformers cannot fuse a mixture's experts again in a quantized folder
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    _write_config(model, schemes, folder, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return size


def _dtype(scales: set[str], wanted: torch.dtype | None) -> torch.dtype:
    """The type of the folder: as wanted, if it keeps the scales.

    Raises:
        InputError: it would round them again.
    """
    import torch

    only = getattr(torch, scales.pop()) if len(scales) == 1 else torch.float32
    if wanted not in (None, only, torch.float32):
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys((only, torch.float32)))
        raise InputError(f"dtype: got {wanted}, expected {expected} (it would round the scales again)")
    return wanted or only


def _scheme(layer: FakeQuantLayer) -> dict[str, Any]:
    """A layer's grids and their format in the library's words.

    Codes of a byte each where the inputs are int8, as kernels for both want them, and where transformers cannot load
    packed ones: zero points (it makes room for them as if they were not packed) and embeddings.
    """
    from distill.quantization.fake_quant import FakeQuantLinear

    weights, inputs = layer.spec.compressed_tensors_arguments(), getattr(layer, "inputs", None)
    if inputs is None:
        packs = weights["type"] == "int" and weights["symmetric"] and isinstance(layer, FakeQuantLinear)
        return {"weights": weights, "format": PACKED if packs else PLAIN}
    wide = weights["num_bits"] == 8 or not weights["symmetric"]
    words = inputs.compressed_tensors_arguments()
    return {"weights": weights, "input_activations": words, "format": INT8 if wide else PACKED}


def _pack(codes: Codes, scheme: dict[str, Any], layer: FakeQuantLayer) -> dict[str, Tensor]:
    """The tensors that stand for one layer's weight in the file, and the scale of its inputs."""
    import torch
    from compressed_tensors.compressors import pack_to_int32

    shared = {"weight_scale": codes.scale.contiguous()}
    if (input_scale := getattr(layer, "input_scale", None)) is not None:
        shared["input_scale"] = input_scale
    if scheme["format"] == PACKED:
        packed = pack_to_int32(codes.values, scheme["weights"]["num_bits"])
        return {"weight_packed": packed, **shared, "weight_shape": torch.tensor(codes.values.shape)}
    zero = {} if codes.zero_point is None else {"weight_zero_point": codes.zero_point.contiguous()}
    return {"weight": codes.values, **shared, **zero}


def _state(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of the file. Tied tensors stay one tensor, so that save_pretrained sees the tie."""
    from distill.quantization.fake_quant import quantizer_tensors

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
    return state


def _write_config(model: PreTrainedModel, schemes: dict[str, dict[str, Any]], folder: Path, dtype: torch.dtype) -> None:
    """Add the type and the quantization to ``config.json``."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

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
    """Layers by scheme; one that all of them share is that of every linear layer, if there are no others."""
    layers: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        layers.setdefault(json.dumps(scheme), []).append(name)
    alike = len(layers) == 1 and set(schemes) <= set(linear)
    return [{"targets": ["Linear"] if alike else names, **json.loads(scheme)} for scheme, names in layers.items()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
