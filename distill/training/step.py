"""One optimizer step: what its micro-batches add up to on a rank, and numbers over all ranks and shards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.losses import LossTerm
from distill.training.ranks import several, summed
from distill.training.sharded import local, whole


@dataclass
class Step:
    """What the micro-batches of a step have added up so far, on this rank.

    Attributes:
        total: the trained sum of losses, scalar.
        tokens: that count, int64 scalar.
        sequences: that were looked at for own sequences.
        terms: the losses apart.
    """

    total: Tensor
    tokens: Tensor
    sequences: int = 0
    terms: dict[str, LossTerm] = field(default_factory=dict)

    @classmethod
    def begin(cls, device: torch.device | None = None) -> Step:
        """Nothing so far."""
        return cls(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))

    def add(self, total: Tensor, tokens: Tensor, terms: dict[str, LossTerm]) -> None:
        """One micro-batch more."""
        self.total = self.total + total
        self.tokens = self.tokens + tokens
        for name, term in terms.items():
            self.terms[name] = self.terms[name] + term if name in self.terms else term


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of every parameter that has one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def norm_of(optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor:
    """The norm of the whole gradient, over all shards; and the gradient made no longer than ``clip``.

    As ``torch.nn.utils.clip_grad_norm_``, whose own factor does not act on a part of the gradient.
    """
    gradients = gradients_of(optimizer)
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if clip is not None and gradients:
        torch._foreach_mul_(local(gradients), (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def means_of(terms: dict[str, LossTerm]) -> dict[str, float]:
    """Mean of each term per token of all ranks (this synchronises with the device)."""
    if several() and terms:
        sums = torch.stack([torch.stack([term.sum.double(), term.count.double()]) for term in terms.values()])
        terms = {name: LossTerm(*pair) for name, pair in zip(terms, summed(sums), strict=True)}
    return {name: float(term.per_token()) for name, term in terms.items()}
