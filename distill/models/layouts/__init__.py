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
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
)
from distill.pruning.layout import Layout

_FILES = (
    llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2, mixtral, qwen3_moe, gpt2, gpt_neox,
    bert, roberta, distilbert,
)  # fmt: skip
LAYOUTS: Mapping[str, Layout] = {file.LAYOUT.model_type: file.LAYOUT for file in _FILES}

__all__ = ["LAYOUTS", "layout_for"]


def layout_for(model_type: str) -> Layout:
    """The layout of an architecture, by its config's ``model_type``.

    Raises:
        InputError: the architecture has no layout.
    """
    if model_type not in LAYOUTS:
        raise InputError(
            f"pruning does not know model_type {model_type!r} (expected one of {', '.join(LAYOUTS)})"
            + (suggest(model_type, LAYOUTS) or "; add its layout to distill/models/layouts")
        )
    return LAYOUTS[model_type]
