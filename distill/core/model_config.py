"""What a model's ``config.json`` may say: kinds of values and possible sizes, checked before anything is built by it.

A library that is asked for a thousand million layers makes lists of that length, and fills all memory, before it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.core.errors import InputError
from distill.core.outside import read_json

MOST = {
    4096: ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
    1 << 24: (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "embedding_size", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"),
        *("num_experts_per_tok", "type_vocab_size", "n_embd", "n_head", "n_inner", "n_heads", "dim", "hidden_dim"),
        *("d_model", "d_ff", "ffn_dim"),
    ),
    1 << 31: ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""Largest size -> the keys that may hold as much; many times what the largest models have."""
LARGEST = {key: most for most, keys in MOST.items() for key in keys}
TEXTS = {"model_type", "hidden_act", "activation_function"}
LISTS = {"architectures", "layer_types"}
OBJECTS = {"auto_map", "quantization_config", "text_config", "rope_parameters", "rope_scaling"}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def read_config(file: Path) -> dict[str, Any]:
    """A ``config.json`` or ``generation_config.json``, checked.

    Raises:
        InputError: it cannot be read, or see :func:`check_config`.
    """
    config = read_json(file)
    check_config(config, str(file))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse values of another kind than models have, and sizes that none can have; null stands for a missing key.

    Args:
        config: a parsed config, with those of its parts.
        where: how the message begins.

    Raises:
        InputError: with one line, for the first such value.
    """
    for key, value in config.items():
        if value is not None and (wanted := _wanted(key, value)) is not None:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:56]} ..."
            raise InputError(f"{where}: {key} is {shown}, expected {wanted}")
        if isinstance(value, dict):
            check_config(value, where)


def _wanted(key: str, value: Any) -> str | None:
    """What a key should hold, in words; None when it does, or nothing is known of it."""
    many = value if isinstance(value, list) else [value]  # a config may give each layer its own size
    if key in LARGEST and not all(_is_whole(item) and -1 <= item <= LARGEST[key] for item in many):
        return f"a whole number up to {LARGEST[key]:,}"
    if key in TOKENS and not all(_is_whole(item) for item in many):
        return "a token id, or a list of them"
    if key in TEXTS and not isinstance(value, str):
        return "a string"
    if key in LISTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return "a list of strings"
    return "an object" if key in OBJECTS and not isinstance(value, dict) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
