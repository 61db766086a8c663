"""What a model says of the next token: the losses by which gradients and left-out layers are judged.

Logits are the largest tensors of a pass, so they are taken to fp32 a few tokens at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.layout import Layout

CHUNK_TOKENS = 1024
"""Tokens whose logits are held in fp32 at once."""


def require_causal(layout: Layout, what: str) -> None:
    """Refuse a model that does not predict the next token.

    Raises:
        InputError: it is an encoder.
    """
    if layout.task != "causal_lm":
        raise InputError(
            f"{what} needs the loss of the next token, which {layout.model_type} does not predict; "
            "choose a criterion that reads activations"
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
    for some, wanted in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        total = total + F.cross_entropy(some.float(), wanted, reduction="none").double().sum()
    return total


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(reference || logits), nats, fp64 scalar; both [tokens, vocabulary]."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for p, q in zip(reference.split(CHUNK_TOKENS), logits.split(CHUNK_TOKENS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
    return total
