"""Losses on the next token, for criteria that measure the effect of a unit on the output.

Logits are the largest tensors of a pass, so they are converted to fp32 in chunks of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.numerics.kl import kl_of_logits

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.layout import Layout

CHUNK_TOKENS = 1024
"""Number of tokens whose logits are in fp32 at the same time."""


def require_causal(layout: Layout, what: str) -> None:
    """Raise unless the model predicts the next token.

    Args:
        layout: the layout of the model's architecture.
        what: the criterion, for the message.

    Raises:
        InputError: the model is an encoder.
    """
    if layout.task != "causal_lm":
        raise InputError(
            f"{what} needs a next-token loss, but {layout.model_type} is an encoder; use a criterion that reads "
            "activations, such as activation or block_influence"
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target), nats, fp64 scalar.

    Args:
        logits: [tokens, vocabulary].
        targets: int64 [tokens].
    """
    import torch
    import torch.nn.functional as F

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
