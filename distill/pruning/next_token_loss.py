"""Losses on the next token, or on what else a task predicts, for criteria that measure what a unit does to the output.

Logits are the largest tensors of a pass, so they are converted to fp32 in chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.numerics.kl import kl_of_logits

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.layout import Layout

CHUNK_TOKENS = 1024
"""Number of tokens whose logits are in fp32 at the same time."""


def require_targets(layout: Layout, batch: Mapping[str, Any], what: str) -> None:
    """Raise unless a batch says what the model predicts.

    Args:
        layout: the layout of the model's architecture.
        batch: of the calibration data.
        what: the criterion, for the message.

    Raises:
        InputError: the model is an encoder, and the batch was made for the next token; or it predicts nothing.
    """
    if layout.task == "embedding" or (layout.task != "causal_lm" and "attention_mask" not in batch):
        raise InputError(
            f"{what} needs a next-token loss or that of the recipe's task, but {layout.model_type} is an encoder"
            f"{' without an output head' if layout.task == 'embedding' else ''}; use a criterion that reads "
            "activations, such as activation or block_influence"
        )


def predictions(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits that count, [tokens, vocabulary].

    Args:
        logits: [batch, sequence, vocabulary], or [batch, classes] of a classifier of texts.
        mask: bool [batch, sequence] or [batch, 1].
    """
    return (logits if logits.ndim > 2 else logits.unsqueeze(1))[mask]


def target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses on the targets, fp64 scalar: -log p(target) in nats, or the squared error of a regression.

    Args:
        logits: [tokens, vocabulary], or [texts, 1] of a regression.
        targets: int64 [tokens], or the true numbers, float [texts].
    """
    import torch
    import torch.nn.functional as F

    if targets.is_floating_point():
        return (logits.squeeze(-1).double() - targets.double()).square().sum()
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for chunk, chunk_targets in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        total = total + F.cross_entropy(chunk.float(), chunk_targets, reduction="none").double().sum()
    return total


def kl_sum(reference: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(reference || logits), nats, fp64 scalar; both [tokens, vocabulary]."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for p, q in zip(reference.split(CHUNK_TOKENS), logits.split(CHUNK_TOKENS), strict=True):
        total = total + kl_of_logits(p.float(), q.float()).double().sum()
    return total
