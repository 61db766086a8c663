"""What of a batch a model reads. Everything else in it (masks, a teacher's cached output) is for us."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Mapping[str, Any], device: Any = None) -> dict[str, Any]:
    """The arguments of a model's forward.

    Args:
        batch: tensors by name: ``input_ids`` [batch, sequence], and ``position_ids`` [batch, sequence] that start anew
            with each document of a row when these must not see each other.
        device: where the model is; None leaves them where they are.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return inputs if device is None else {name: tensor.to(device) for name, tensor in inputs.items()}
