"""The config of a new, randomly initialized model in a recipe."""

from __future__ import annotations

from typing import Any

from distill.core.spec import Spec


class NewModel(Spec):
    """A new, randomly initialized model with a transformers config."""

    config: dict[str, Any]
    """``model_type`` and the keys of its config; vocab_size defaults to the tokenizer's size."""
