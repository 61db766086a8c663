"""Fake quantization of a model's keys and values, as in an engine's low-bit KV cache.

An implementation of transformers' attention interface quantizes and dequantizes keys and values and calls sdpa. It
works for every architecture that uses the interface. The type of the cache is stored in the model's config
(``kv_cache_type``), and :func:`~distill.models.load.load_model` enables it again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.core.errors import InputError
from distill.quantization.fake_quant import rounds_cache
from distill.quantization.kv_cache import CacheType, check_cache, round_keys, round_values

NAME, BELOW = "sdpa_rounded", "sdpa"
INTERLEAVED = {"llama", "mistral"}
"""Model types for which llama.cpp interleaves the two halves of a head."""
KEY = "kv_cache_type"


def cache_type(config: PretrainedConfig) -> CacheType | None:
    """The type of the low-bit KV cache in a config; None if keys and values are not quantized."""
    return getattr(config, KEY, None)


def round_cache(model: PreTrainedModel, kind: CacheType) -> None:
    """Make every attention layer quantize its keys and values, in place, and set the type in the config.

    Raises:
        InputError: the model's attention is not sdpa, or the block size of the type does not divide ``head_dim``.
    """
    config = model.config
    if config._attn_implementation not in (NAME, BELOW):
        raise InputError(
            f"kv_cache: needs attention implementation {BELOW} (got {config._attn_implementation} for "
            f"{config.model_type}); remove kv_cache"
        )
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    if not layers:
        raise InputError(
            f"kv_cache: {config.model_type} does not use transformers' attention interface; remove kv_cache"
        )
    for layer in layers:
        check_cache(kind, layer.head_dim if hasattr(layer, "head_dim") else layer.head_size)  # GPT-NeoX's name for it
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for layer in layers:
        layer.kv_cache_type, layer.enabled = kind, True
        layer.interleaved = config.model_type in INTERLEAVED
    model.set_attn_implementation(NAME)
    setattr(config, KEY, kind)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """``sdpa_attention_forward`` with quantized keys and values, [batch, kv_heads, sequence, head_dim]."""
    layer: Any = module
    if rounds_cache(layer) and layer.enabled:
        key = round_keys(key, layer.kv_cache_type, interleaved=layer.interleaved)
        value = round_values(value, layer.kv_cache_type)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
