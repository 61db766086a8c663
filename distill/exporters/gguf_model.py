"""The architectures that llama.cpp computes in the same way as transformers: header keys, tensor names, row order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import RopeScalingType
from torch import Tensor
from transformers import PretrainedConfig

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.quantization.base import Codes


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: ``general.architecture`` of the file.
        interleaved: whether the rotary embedding rotates pairs of neighbouring rows of a head, so that query and key
            rows must be permuted; transformers rotates row i with row i + head_dim / 2.
        biases: linear layers that may have a bias, by the last part of their names.
        activation: of the MLP.
        norm_offset: what the model adds to the weights of its norms; llama.cpp adds nothing, so it is added here.
        whole_heads: whether heads x head size must be the hidden size.
        tied: whether the head must be the embeddings.
        windows: whether some layers may have a sliding window.
    """

    name: str
    interleaved: bool
    biases: frozenset[str] = frozenset()
    activation: str = "silu"
    norm_offset: float = 0.0
    whole_heads: bool = False
    tied: bool = False
    windows: bool = False


QKV = frozenset({"q_proj", "k_proj", "v_proj"})
GELU = "gelu_pytorch_tanh"
LLAMA = Architecture("llama", True, QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"})
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", False, QKV, whole_heads=True),
    "qwen3": Architecture("qwen3", False),
    "gemma": Architecture("gemma", False, activation=GELU, norm_offset=1.0, tied=True),
    "gemma2": Architecture("gemma2", False, activation=GELU, norm_offset=1.0, tied=True, windows=True),
    "gemma3_text": Architecture("gemma3", False, activation=GELU, norm_offset=1.0, windows=True),
    "olmo2": Architecture("olmo2", False, whole_heads=True),
    "phi3": Architecture("phi3", False, whole_heads=True),
}
ROPES = ("default", "linear", "llama3")


def architecture_of(folder: Path, config: PretrainedConfig) -> Architecture:
    """The llama.cpp architecture of a model.

    Raises:
        InputError: llama.cpp would not compute the same as transformers, or the exporter does not support it.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{folder}: model_type {kind!r} cannot be written as GGUF (expected one of {', '.join(ARCHITECTURES)})"
            + suggest(kind, ARCHITECTURES)
        )
    architecture = ARCHITECTURES[kind]
    head_dim, heads = head_dim_of(config), config.num_attention_heads
    key = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
    activation = getattr(config, key)
    rope, scale = rope_of(config), getattr(config, "query_pre_attn_scalar", head_dim)
    wrong = [
        (activation != architecture.activation, f"{key} {activation!r}, expected {architecture.activation!r}"),
        (
            not architecture.windows and window_of(config) is not None,
            f"sliding_window {window_of(config)}, expected null",
        ),
        (rope["rope_type"] not in ROPES, f"rope_type {rope['rope_type']!r}, expected one of {', '.join(ROPES)}"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor, expected 1.0"),
        (
            architecture.whole_heads and heads * head_dim != config.hidden_size,
            f"num_attention_heads {heads} x head_dim {head_dim} = {heads * head_dim}, expected hidden_size "
            f"({config.hidden_size}), as llama.cpp requires for {kind}; do not prune heads",
        ),
        (architecture.tied and not config.tie_word_embeddings, "a head of its own, expected tied embeddings"),
        (scale != attention_scale_of(config), f"query_pre_attn_scalar {scale}, expected {attention_scale_of(config)}"),
        (getattr(config, "use_bidirectional_attention", False), "use_bidirectional_attention, expected false"),
        (
            kind == "gemma2" and config.attn_logit_softcapping is None,
            "attn_logit_softcapping null, but llama.cpp always caps",
        ),
        (
            kind == "gemma3_text" and getattr(config, "attn_logit_softcapping", None) is not None,
            "attn_logit_softcapping, expected null",
        ),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise InputError(f"{folder}: cannot be written as GGUF: {kind} with {what}")
    return architecture


def window_of(config: PretrainedConfig) -> int | None:
    """The sliding window, if it is shorter than the longest text."""
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None


def attention_scale_of(config: PretrainedConfig) -> int:
    """llama.cpp divides a Gemma's scores by the root of this; it knows 27B models by their number of layers."""
    is_27b = (config.model_type, config.num_hidden_layers) in {("gemma2", 46), ("gemma3_text", 62)}
    return config.hidden_size // config.num_attention_heads if is_27b else head_dim_of(config)


def head_dim_of(config: PretrainedConfig) -> int:
    """Size of one head: ``head_dim``, or hidden size / heads if the config has none."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding's settings; of a model that has several those of its layers without a window."""
    return {"rope_type": "default", "rope_theta": 10000.0, **_rope(config, "full_attention")}


def _rope(config: PretrainedConfig, layers: str) -> dict[str, Any]:
    settings = config.rope_parameters or {}
    return dict(settings.get(layers, settings))


def add_model(writer: Any, config: PretrainedConfig) -> None:
    """Write the sizes of the model into the file's header."""
    head_dim, rope = head_dim_of(config), rope_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, key, None)) is not None:
            getattr(writer, f"add_{key}")(cap)
    if ARCHITECTURES[config.model_type].windows and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        windows = [kind == "sliding_attention" for kind in config.layer_types]
        period = {"gemma2": 2, "gemma3_text": 6}[config.model_type]
        if windows != [layer % period < period - 1 for layer in range(len(windows))]:  # else llama.cpp's default
            writer.add_sliding_window_pattern(windows)
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention").get("rope_theta", 10000.0))


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """The divisors of the frequencies of a llama3 rotary embedding, [head_dim / 2]; None for other types."""
    rope, head_dim = rope_of(config), head_dim_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        # 1 for `high` or more periods in the original context, `factor` for `low` or fewer, interpolated between
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def tensor_names(architecture: Architecture, config: PretrainedConfig) -> Callable[[str], str]:
    """A function that maps a weight's name in transformers to llama.cpp's; it raises InputError for unknown weights."""
    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)

    def name_of(key: str) -> str:
        layer, _, leaf = key.rpartition(".")
        found = table.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None or (leaf == "bias" and layer.rpartition(".")[2] not in architecture.biases):
            raise InputError(
                f"{key}: llama.cpp's {architecture.name} has no such weight; choose another target than gguf"
            )
        return found

    return name_of


def in_order(key: str, weight: Tensor | Codes, architecture: Architecture, config: PretrainedConfig) -> Tensor | Codes:
    """The weight as llama.cpp has it: rows of query and key projections permuted, and norms with their offset."""
    if architecture.norm_offset and key.endswith("norm.weight"):
        assert not isinstance(weight, Codes)
        return weight.float() + architecture.norm_offset  # in fp32, as the model adds it
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = key.rpartition(".")[0].rpartition(".")[2]
    if not architecture.interleaved or part not in heads:
        return weight
    half = head_dim_of(config) // 2
    # per head, (first half, second half) -> interleaved pairs; indices [heads * head_dim]
    rows = torch.arange(heads[part] * 2 * half).view(heads[part], 2, half).transpose(1, 2).flatten()
    if isinstance(weight, Codes):
        return replace(weight, values=weight.values[rows], scale=weight.scale[rows])
    return weight[rows]
