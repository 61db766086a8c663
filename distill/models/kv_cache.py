"""A model that attends to keys and values as an engine's low-bit cache would give them back.

Through transformers' attention interface: an implementation of ours rounds keys and values and hands them on to sdpa,
in every architecture that asks the interface. The type stands in the model's config (``kv_cache_type``), so that a
folder says what it was trained for, and :func:`~distill.models.load.load_model` computes with it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.quantization.fake_quant import rounds_cache
from distill.quantization.kv_cache import CacheType, check_cache, round_keys, round_values

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

NAME, BELOW = "sdpa_rounded", "sdpa"
INTERLEAVED = {"llama", "mistral"}
"""Model types whose heads llama.cpp has in another order."""
KEY = "kv_cache_type"


def cache_type(config: PretrainedConfig) -> CacheType | None:
    """What a config says of the cache; None: keys and values are kept as they are."""
    return getattr(config, KEY, None)


def round_cache(model: PreTrainedModel, kind: CacheType) -> None:
    """Have every attention layer round its keys and values, in place, and the config say so.

    Raises:
        InputError: the model's attention is not sdpa, or no cache of this type can hold its heads.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config
    if config._attn_implementation not in (NAME, BELOW):
        raise InputError(
            f"kv_cache: {config.model_type} attends by {config._attn_implementation}, and keys and values can be "
            f"rounded for {BELOW} only; unset kv_cache"
        )
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    if not layers:
        raise InputError(f"kv_cache: {config.model_type} has no attention that can be told what to do; unset it")
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
    """Stands in for ``sdpa_attention_forward``; keys and values are [batch, kv_heads, sequence, head_dim]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer: Any = module
    if rounds_cache(layer) and layer.enabled:
        key = round_keys(key, layer.kv_cache_type, interleaved=layer.interleaved)
        value = round_values(value, layer.kv_cache_type)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
