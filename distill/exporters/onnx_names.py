"""File names, and names of the inputs and outputs, of an ONNX graph."""

from __future__ import annotations

from typing import Any

from distill.core.batch import reads_token_types

FILE, DATA = "model.onnx", "model.onnx.data"
PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the names of KV cache inputs and outputs; other tools use the same names."""


def inputs_of(config: Any) -> list[str]:
    """Names of a graph's inputs, int64 [batch, sequence] each; encoders of text pairs also have ``token_type_ids``."""
    segments = ["token_type_ids"] if reads_token_types(config) else []
    return ["input_ids", "attention_mask", *segments]
