"""Loads a model folder with plain transformers and compares it with the trained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.core.batch import known_inputs, model_inputs
from distill.core.errors import DistillError, InputError
from distill.exporters.base import VerifyResult, require_close
from distill.exporters.compare_logits import compare
from distill.models.head_names import head_of, loader_of, task_of
from distill.models.kv_cache import cache_type, round_cache
from distill.models.load import load_config, without_bars
from distill.pretrained import model_from


def verify(
    source_model: PreTrainedModel, folder: Path, batches: Iterable[Mapping[str, Tensor]], *, max_kl: float = 1e-6
) -> VerifyResult:
    """Load the folder with plain ``AutoModelForCausalLM.from_pretrained`` in fp32 and compare logits.

    Args:
        source_model: the trained model. If it is fake-quantized, its other tensors must have been rounded to their
            stored type (:func:`~distill.quantization.convert.round_unquantized`).
        folder: a model folder.
        batches: ``input_ids`` int64 [batch, sequence], ``mask`` bool [batch, sequence], and ``attention_mask`` or
            ``position_ids`` if they are needed.
        max_kl: bound on the KL of any token, nats.

    Raises:
        DistillError: the folder does not load completely, or a token's KL is above the bound.
    """
    exported = _reload(folder).to(source_model.device)  # type: ignore[arg-type]
    training = source_model.training
    source_model.eval()
    try:
        with without_bars(str(folder)):  # packed weights are unpacked at the first forward
            result = compare(
                lambda batch: _logits(source_model, batch), lambda batch: _logits(exported, batch), batches, folder
            )
    finally:
        source_model.train(training)
    return require_close(result, max_kl, folder)


def _reload(folder: Path) -> PreTrainedModel:
    """The exported model, loaded with plain transformers.

    Raises:
        DistillError: transformers cannot load it, or weights are missing, unexpected or of another shape.
    """
    try:
        with without_bars(str(folder)):
            loader = loader_of(task_of(load_config(str(folder))))
            model, report = model_from(str(folder), loader, dtype=torch.float32, output_loading_info=True)
    except InputError as error:
        raise DistillError(f"the exported model does not load in transformers: {error}") from error
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, keys in wrong.items():
        if keys:
            raise DistillError(
                f"{folder}: the exported weights do not fit the config: {kind.replace('_', ' ')}: {keys[0]}"
            )
    if (cache := cache_type(model.config)) is not None:
        round_cache(model, cache)
    return model.eval()


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """[batch, sequence, vocabulary], or [batch, 1, classes] of a classifier of texts; fp32.

    A model without a head has no logits. Its hidden states at the first token are compared instead: [batch, 1, hidden].
    """
    inputs = known_inputs(model, model_inputs(batch, model.device))
    if (head := head_of(model)) == "causal_lm":
        return model(**inputs, use_cache=False).logits.float()
    if head == "embedding":
        return model(**inputs).last_hidden_state[:, :1].float()
    logits = model(**inputs).logits.float()
    return logits if logits.ndim > 2 else logits.unsqueeze(1)
