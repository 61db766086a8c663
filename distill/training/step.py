"""One optimizer step: sums over its micro-batches on one rank, and results over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.losses import LossTerm
from distill.training.ranks import several, summed
from distill.training.sharded import local, whole


@dataclass
class Step:
    """Sums over the micro-batches of the current step, on this rank.

    Attributes:
        total: weighted sum of the losses, which is minimised; scalar.
        tokens: number of tokens in the sum, int64 scalar.
        sequences: number of sequences; only counted with ``on_policy``.
        terms: unweighted losses by name.
    """

    total: Tensor
    tokens: Tensor
    sequences: int = 0
    terms: dict[str, LossTerm] = field(default_factory=dict)

    @classmethod
    def begin(cls, device: torch.device | None = None) -> Step:
        """The sums before the first micro-batch: all are 0."""
        return cls(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))

    def add(self, total: Tensor, tokens: Tensor, terms: dict[str, LossTerm]) -> None:
        """Add a micro-batch."""
        self.total = self.total + total
        self.tokens = self.tokens + tokens
        for name, term in terms.items():
            self.terms[name] = self.terms[name] + term if name in self.terms else term


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def norm_of(optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor:
    """Clip the gradient to the norm ``clip`` in place, and return the norm before clipping, over all shards (scalar).

    This is ``torch.nn.utils.clip_grad_norm_`` for sharded gradients: each rank scales its own shards.
    """
    gradients = gradients_of(optimizer)
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if clip is not None and gradients:
        torch._foreach_mul_(local(gradients), (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def means_of(terms: dict[str, LossTerm]) -> dict[str, float]:
    """Mean of each term per token, over all ranks (synchronises with the device)."""
    if several() and terms:
        sums = torch.stack([torch.stack([term.sum.double(), term.count.double()]) for term in terms.values()])
        terms = {name: LossTerm(*pair) for name, pair in zip(terms, summed(sums), strict=True)}
    return {name: float(term.per_token()) for name, term in terms.items()}
