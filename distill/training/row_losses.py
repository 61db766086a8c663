"""The mean loss of a model on each row of a batch, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.core.batch import model_inputs
from distill.losses.chunks import tokens_at_once
from distill.models.head import hidden_states, output_head


@torch.inference_mode()
def row_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood of the text in nats per token, over the predictions of each row that count.

    Args:
        model: a causal language model in evaluation mode.
        batch: see :mod:`distill.core.batch`.

    Returns:
        fp64 [batch], on the CPU; 0 where no prediction of a row counts.
    """
    device, head = model.device, output_head(model).logits
    hidden = hidden_states(model, **model_inputs(batch, device))  # [batch, sequence, hidden]
    mask = batch["mask"].to(device)
    kept = hidden[mask]  # [tokens, hidden], those that count
    targets = batch["targets"].to(device)[mask]  # [tokens]
    rows = mask.nonzero()[:, 0]  # [tokens], which row each is of
    sums = torch.zeros(len(mask), dtype=torch.float64, device=device)
    size = tokens_at_once(model.config.get_text_config().vocab_size, len(kept), on_cpu=device.type == "cpu")
    for start in range(0, len(kept), size):
        part = slice(start, start + size)
        log_probabilities = head(kept[part]).float().log_softmax(-1)  # [chunk, vocabulary]
        losses = -log_probabilities.gather(-1, targets[part, None])[:, 0]  # [chunk]
        sums.index_add_(0, rows[part], losses.double())
    return (sums / mask.sum(1).clamp(min=1)).cpu()
