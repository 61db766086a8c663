"""Low-bit model folders in the compressed-tensors pack-quantized format, which transformers loads without our code.

The codes are packed into int32 words by the library's own packer, so the weight that a loader unpacks is, bit for bit,
the one that the fake-quantized model trained with. Scales are bfloat16 because a loader casts them to the type in
which it holds the model: bfloat16 and fp32 keep them as they are, fp16 would not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.int4_group import Int4Group
from distill.quantization.int8_channel import Int8Channel

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "pack-quantized"


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
    spec: QuantizerSpec,
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
        spec: the grid that it was prepared with.
        folder: where to; made if it is not there.
        tokenizer: saved beside the weights, if given.
        dtype: of embeddings, norms, biases and skipped layers: bfloat16 (default) or float32.

    Raises:
        InputError: the model is not prepared with ``spec``, has adapters, or the type or the grid cannot be stored.
    """
    import torch

    from distill.quantization.convert import convert
    from distill.quantization.fake_quant import fake_quant_layers

    dtype = dtype or torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float32):
        raise InputError(
            f"dtype: got {dtype}, expected torch.bfloat16 or torch.float32 (fp16 would round the scales again)"
        )
    arguments = _weight_arguments(spec)
    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise InputError(f"save: got {type(model).__name__}, expected a transformers model with its adapters merged")
    for name, layer in fake_quant_layers(model).items():
        if layer.spec != spec:
            raise InputError(f"{name}: prepared with another grid ({layer.spec!r}) than the one to save ({spec!r})")
    codes = convert(model)
    packed = {name: _pack(layer_codes, spec.bits) for name, layer_codes in codes.items()}
    state = _state(model, packed, dtype)
    size = PackedSize(
        layers=len(codes),
        packed_bytes=sum(_bytes(tensor) for tensors in packed.values() for tensor in tensors.values()),
        bfloat16_bytes=sum(2 * layer_codes.values.numel() for layer_codes in codes.values()),
        total_bytes=sum(_bytes(tensor) for tensor in {tensor.data_ptr(): tensor for tensor in state.values()}.values()),
    )
    model.save_pretrained(folder, state_dict=state)
    _write_config(model, set(codes), arguments, folder, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return size


def _weight_arguments(spec: QuantizerSpec) -> dict[str, Any]:
    """The grid in compressed-tensors' words.

    Raises:
        InputError: the format has no words for it.
    """
    shared = {"num_bits": spec.bits, "type": "int", "symmetric": True, "dynamic": False}
    if isinstance(spec, Int4Group):
        return {**shared, "strategy": "group", "group_size": spec.group_size}
    if isinstance(spec, Int8Channel):
        return {**shared, "strategy": "channel"}
    raise InputError(
        f"quantizer {spec.kind!r} cannot be stored as compressed-tensors (expected int8_channel or int4_group)"
    )


def _pack(codes: Codes, bits: int) -> dict[str, Tensor]:
    """The tensors that stand for one layer's weight in the file."""
    import torch
    from compressed_tensors.compressors import pack_to_int32

    return {
        "weight_packed": pack_to_int32(codes.values, bits),
        "weight_scale": codes.scale.contiguous(),
        "weight_shape": torch.tensor(codes.values.shape),
    }


def _state(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of the file. Tied tensors stay one tensor, so that save_pretrained sees the tie."""
    state: dict[str, Tensor] = {}
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for key, tensor in model.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and layer in packed:
            state.update({f"{layer}.{name}": part for name, part in packed[layer].items()})
        elif tensor.is_floating_point():
            state[key] = cast.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
        else:
            state[key] = tensor
    return state


def _write_config(
    model: PreTrainedModel, quantized: set[str], arguments: dict[str, Any], folder: Path, dtype: torch.dtype
) -> None:
    """Add the type and the quantization to ``config.json``."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    ignored = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and n not in quantized]
    group = {"targets": ["Linear"], "weights": arguments, "format": FORMAT}
    config = QuantizationConfig.model_validate(
        {"config_groups": {"group_0": group}, "format": FORMAT, "quantization_status": "compressed", "ignore": ignored}
    )
    file = Path(folder) / "config.json"
    text = json.loads(file.read_text(encoding="utf-8"))
    text["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(text), encoding="utf-8")
    ModelCompressor(quantization_config=config).update_config(str(folder))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
