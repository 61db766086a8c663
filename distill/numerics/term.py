"""A loss that is summed over tokens: the sum and the number of tokens are kept separately until the mean is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """A loss summed over the counted tokens, and the number of these tokens.

    Sums can be added over chunks, micro-batches and ranks; means cannot. So every loss returns this, and only
    :meth:`per_token` divides.

    Attributes:
        sum: sum of the loss, scalar, in the dtype in which it was summed; in nats if the loss compares distributions.
        count: number of tokens in the sum, scalar.
    """

    sum: Tensor
    count: Tensor

    def __add__(self, other: LossTerm) -> LossTerm:
        return LossTerm(self.sum + other.sum, self.count + other.count)

    def detach(self) -> LossTerm:
        """The same term without a graph, for logging."""
        return LossTerm(self.sum.detach(), self.count.detach())

    def to(self, device: torch.device) -> LossTerm:
        """The same term on another device."""
        return LossTerm(self.sum.to(device), self.count.to(device))

    def per_token(self) -> Tensor:
        """The loss per token; 0 if no token is counted. No other line of the project divides a loss by its tokens."""
        return self.sum / self.count.clamp(min=1)
