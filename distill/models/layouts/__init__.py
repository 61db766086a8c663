"""Layouts, one file per architecture; to add one, write a file and add it here (docs/add-an-architecture.md)."""

from collections.abc import Mapping

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.models.head_names import named_head
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
from distill.pruning.layout import Config, Layout

_FILES = (
    llama, mistral, qwen2, qwen3, gemma2, gemma3_text, ministral3, smollm3, granite, phi3, olmo2, mixtral, qwen3_moe,
    gpt2, gpt_neox, bert, roberta, distilbert,
)  # fmt: skip
LAYOUTS: Mapping[str, Layout] = {file.LAYOUT.model_type: file.LAYOUT for file in _FILES}
_OTHER_HEADS: Mapping[tuple[str, str], Layout] = {
    (layout.model_type, layout.task): layout for file in _FILES for layout in getattr(file, "OTHER_HEADS", ())
}
"""(model type, head) -> the layout of an encoder with another head than that for masked tokens."""

NOT_YET: Mapping[str, str] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"), "most layers have linear attention"),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h", "falcon_h1", "jamba", "bamba"), "it has state space layers"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "most of its layers are convolutions"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "its layers have embeddings and head sizes of their own"),
    "gpt_oss": "its experts have interleaved weights and its heads have sinks",
}
"""``model_type`` of architectures that have no layout -> the reason."""

__all__ = ["LAYOUTS", "find_layout", "layout_for", "layout_of"]


def find_layout(config: Config) -> Layout | None:
    """The layout of a model, by its architecture and its head; None if there is none.

    Args:
        config: ``config.to_dict()`` or a parsed ``config.json``, whose ``architectures`` name the head.
    """
    kind = str(config.get("model_type"))
    layout = LAYOUTS.get(kind)
    if layout is None or layout.task == "causal_lm":
        head = named_head(config)
        # decoders have no layout with a head for classes
        return layout if head in (None, "causal_lm", "embedding") else None
    head = named_head(config) or layout.task
    return layout if head == layout.task else _OTHER_HEADS.get((kind, head))


def layout_of(config: Config) -> Layout:
    """As :func:`find_layout`.

    Raises:
        InputError: there is none.
    """
    if (layout := find_layout(config)) is not None:
        return layout
    kind = str(config.get("model_type"))
    if kind in LAYOUTS:
        raise InputError(
            f"pruning does not know {kind} with this head ({', '.join(config.get('architectures') or ['unnamed'])}); "
            f"its layouts are for {', '.join(heads_of(kind))}"
        )
    return layout_for(kind)


def heads_of(kind: str) -> list[str]:
    """The heads for which an architecture has a layout."""
    return [LAYOUTS[kind].task, *(head for name, head in _OTHER_HEADS if name == kind)]


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
