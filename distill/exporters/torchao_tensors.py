"""Writes a model folder whose weights are torchao's tensor subclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int8WeightOnlyConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from distill.core.errors import InputError
from distill.data.tokenizer import load_tokenizer
from distill.exporters.base import cache_notes
from distill.exporters.stored_weights import bits_of, stored_weights
from distill.models.load import load_model, without_bars
from distill.pretrained import model_from
from distill.quantization.base import Codes
from distill.quantization.fake_quant import InputQuantLinear
from distill.quantization.int8_channel import Int8Channel


def write(source_folder: Path, folder: Path, *, rounds: bool, rounds_ends: bool) -> list[str]:
    """Write the export, without a model card; see :meth:`~distill.exporters.base.ExporterSpec.export`.

    Args:
        source_folder: the model's folder.
        folder: an empty folder.
        rounds: whether to round the layers of a full-precision model to int8; if not, codes are written.
        rounds_ends: whether to round full-precision embeddings and head to int8.

    Raises:
        InputError: something is to be rounded that is low-bit already, or not ``rounds`` and the weights are not.
    """
    bits = bits_of(source_folder)
    if bool(bits) == bool(rounds):
        found = "low-bit already; remove round_to" if bits else "not low-bit; set round_to: int8"
        raise InputError(f"{source_folder}: target torchao: the weights are {found}")
    with without_bars(str(source_folder)):
        model = _rounded(source_folder) if rounds else _with_codes(source_folder, bits)
        if rounds_ends:
            _round_ends(model)
        model.save_pretrained(folder)
    load_tokenizer(source_folder).save_pretrained(folder)
    cache = cache_notes(source_folder, "which plain transformers does not have; it was verified with this cache added")
    if rounds_ends:
        cache.insert(0, "embeddings and head: int8 per row, rounded to nearest by the exporter, after training")
    if rounds:
        return ["linear layers: int8 per channel, rounded to nearest by the exporter, after training", *cache]
    written = [name for name, layer in model.named_modules() if name in bits and _has_codes(layer)]
    if len(written) < len(bits):
        kept = type(model.get_input_embeddings()).__name__
        cache.insert(0, f"embeddings and head: float32, as transformers cannot load {kept} with torchao's codes")
    widths = ", ".join(str(width) for width in sorted({bits[name] for name in written}))
    return [
        f"{len(written)} layers from their codes of {widths} bits, one byte per code; all other weights in float32",
        *cache,
    ]


def _rounded(source_folder: Path) -> PreTrainedModel:
    """A full-precision model with torchao's int8 weights."""
    scheme = TorchAoConfig(Int8WeightOnlyConfig())
    model: PreTrainedModel = model_from(
        str(source_folder), AutoModelForCausalLM, dtype=torch.float32, quantization_config=scheme
    )
    untyped: Any = model
    untyped.hf_quantizer.__class__ = _OncePerWeight
    return model


def _round_ends(model: PreTrainedModel) -> None:
    """Give the embeddings and the head of a model int8 weights with one scale per row, in place.

    Raises:
        InputError: they are low-bit already.
    """
    untyped: Any = model
    rounded: dict[int, torch.nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = module.weight
        if _has_codes(module):
            raise InputError("the embeddings are low-bit already; remove embeddings from the target")
        if not _loads_with_codes(module):
            raise InputError(
                f"target torchao: transformers cannot load {type(module).__name__} with torchao's codes; remove "
                "embeddings from the target"
            )
        if id(weight) not in rounded:
            tensor = _tensor("embeddings", Int8Channel().quantize(weight.detach()), 8)
            rounded[id(weight)] = torch.nn.Parameter(tensor, requires_grad=False)
        module.weight = rounded[id(weight)]
    scheme = untyped.hf_quantizer.quantization_config
    scheme.include_input_output_embeddings = True


def _with_codes(source_folder: Path, bits: dict[str, int]) -> PreTrainedModel:
    """A quantized model whose weights are torchao tensors with the same codes.

    Raises:
        InputError: torchao's tensors cannot represent the codes of a layer, or the model quantizes its activations.
    """
    model = load_model(str(source_folder), dtype="float32")
    layers = dict(model.named_modules())
    if rounding := [name for name, layer in layers.items() if isinstance(layer, InputQuantLinear)]:
        raise InputError(
            f"{rounding[0]}: quantizes its activations, which target torchao does not support; choose another target"
        )
    for key, codes in stored_weights(source_folder):
        if isinstance(codes, Codes):
            name = key.removesuffix(".weight")
            if _loads_with_codes(layers[name]):
                layers[name].weight = torch.nn.Parameter(_tensor(name, codes, bits[name]), requires_grad=False)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.tie_word_embeddings:
        ends[1].weight = ends[0].weight
    linear = [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
    scheme = TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{max(bits.values())}")),
        modules_to_not_convert=[name for name in linear if not _has_codes(layers[name])],
        include_input_output_embeddings=any(_has_codes(end) for end in ends),
    )
    model.config.quantization_config = scheme
    untyped: Any = model
    untyped.hf_quantizer = _OncePerWeight(scheme, pre_quantized=True)
    return model


def _has_codes(layer: Any) -> bool:
    return isinstance(layer.weight, IntxUnpackedToInt8Tensor)


def _loads_with_codes(layer: torch.nn.Module) -> bool:
    """Whether transformers can load a layer on codes; it leaves other buffers of such a layer, as Gemma's embeddings
    have, without their values."""
    return not list(layer.buffers())


class _OncePerWeight(TorchAoHfQuantizer):
    """Saves a shared weight once: a loader ties the modules, and cannot compare two stored tensors of torchao."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        state = model.state_dict()
        return flatten_tensor_state_dict({key: state[key] for key in state if key not in model.all_tied_weights_keys})


def _tensor(name: str, codes: Codes, bits: int) -> torch.Tensor:
    if codes.values.dtype != torch.int8:
        what = str(codes.values.dtype).removeprefix("torch.")
        raise InputError(f"{name}: target torchao supports integer codes only (got {what}); choose another target")
    scale = codes.scale.float()  # [out, groups]
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if codes.zero_point is None else codes.zero_point
    return IntxUnpackedToInt8Tensor(
        qdata=codes.values,
        scale=scale,
        zero_point=zero_point,
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, codes.values.shape[-1] // scale.shape[-1]),
        dtype=torch.float32,
        activation_quantization=None,
    )
