"""One layout an architecture; add a file and a name to this list to prune another one."""

from collections.abc import Mapping

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.models.layouts.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from distill.pruning.layout import Layout

LAYOUTS: Mapping[str, Layout] = {layout.model_type: layout for layout in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["LAYOUTS", "layout_for"]


def layout_for(model_type: str) -> Layout:
    """The layout of an architecture, by its config's ``model_type``.

    Raises:
        InputError: the architecture has no layout.
    """
    if model_type not in LAYOUTS:
        raise InputError(
            f"model_type {model_type!r} cannot be pruned (expected one of {', '.join(LAYOUTS)})"
            + (suggest(model_type, LAYOUTS) or "; add its layout to distill/models/layouts")
        )
    return LAYOUTS[model_type]
