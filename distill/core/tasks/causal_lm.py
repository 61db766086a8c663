"""The next token of a text: what a causal language model predicts. The default."""

from __future__ import annotations

from typing import ClassVar, Literal

from distill.core.tasks.base import Head, ModelTask


class CausalLM(ModelTask):
    """Predict the next token of a text (the default)."""

    head: ClassVar[Head] = "causal_lm"

    kind: Literal["causal_lm"] = "causal_lm"
