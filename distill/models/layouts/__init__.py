"""Layouts, one file per architecture; to add one, write a file and add it here (docs/add-an-architecture.md)."""

from collections.abc import Mapping

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.models.layouts import (
    bert,
    distilbert,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    granite,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    smollm3,
)
from distill.pruning.layout import Layout

_FILES = (
    llama, mistral, qwen2, qwen3, gemma2, gemma3_text, ministral3, smollm3, granite, phi3, olmo2, mixtral, qwen3_moe,
    gpt2, gpt_neox, bert, roberta, distilbert,
)  # fmt: skip
LAYOUTS: Mapping[str, Layout] = {file.LAYOUT.model_type: file.LAYOUT for file in _FILES}

NOT_YET: Mapping[str, str] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"), "most layers have linear attention"),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h", "falcon_h1", "jamba", "bamba"), "it has state space layers"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "most of its layers are convolutions"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "its layers have embeddings and head sizes of their own"),
    "gpt_oss": "its experts have interleaved weights and its heads have sinks",
}
"""``model_type`` of architectures that have no layout -> the reason."""

__all__ = ["LAYOUTS", "layout_for"]


def layout_for(model_type: str) -> Layout:
    """The layout of an architecture, by its config's ``model_type``.

    Raises:
        InputError: the architecture has no layout.
    """
    if model_type in NOT_YET:
        raise InputError(
            f"model_type {model_type!r} cannot be pruned yet, because {NOT_YET[model_type]}; it can be distilled into "
            "another model with its tokenizer, and its linear layers can be quantized"
        )
    if model_type not in LAYOUTS:
        raise InputError(
            f"pruning does not know model_type {model_type!r} (expected one of {', '.join(LAYOUTS)})"
            + (suggest(model_type, LAYOUTS) or "; add its layout to distill/models/layouts")
        )
    return LAYOUTS[model_type]
