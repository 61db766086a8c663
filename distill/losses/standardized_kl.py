"""Forward KL of standardised logits: the student learns the ranking and relative logits, but not the confidence.

    loss = T^2 * KL(p || q),   p = softmax(Z(teacher) / T),  q = softmax(Z(student) / T),
    Z(z) = (z - mean(z)) / std(z) for each token
    d loss / d student = T * (q - p - Z * mean((q - p) * Z)) / std(student),   Z = Z(student)

A small student often cannot produce logits as large as its teacher's. This loss compares only their relative sizes. The
price is that the scale of the student's logits is not determined: the loss is zero for every q = softmax(a * teacher)
with a > 0, so the probabilities are not calibrated. Alone it does not give a language model with a meaningful
perplexity; add cross_entropy or forward_kl. The larger the vocabulary, the flatter the standardised distribution at the
same T, because the largest logit is only a few standard deviations above the mean. So T = 2, which the paper uses for
100 to 1000 classes, is too high for a language model.

Source: Sun et al. 2024, arXiv 2403.01427 (logit standardisation), algorithm 1, with the population standard deviation;
the gradient flows through it. For T^2 see arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossSpec
from distill.losses.forward_kl import forward_kl
from distill.losses.schedule import Positive, number
from distill.numerics.kl import kl
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import LogitTile

_VARIANCE = 1e-6
"""Added to the variance, so that the gradient is finite if all logits are equal."""


class StandardizedKL(LossSpec):
    """Forward KL of logits that are standardised per token, to mean 0 and standard deviation 1, in both models."""

    kind: Literal["standardized_kl"] = "standardized_kl"
    temperature: Positive = 1.0
    """Softmax temperature of both models, after the standardisation; 1 is off. The loss is multiplied by its square."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        assert teacher_logits is not None
        return standardized_kl(student_logits, teacher_logits, mask, temperature=number(self.temperature))

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """See :class:`LossSpec`. It reads the logits of the tile, and standardises copies of them."""
        temperature = number(self.temperature)
        (z, per_std), (of_teacher, _) = (_standardized(tile, logits) for logits in tile.shared())
        (q, log_q, _), (p, log_p, _) = (tile.softmax(x, temperature) for x in (z, of_teacher))
        with tile.borrow(p) as scratch:
            value = temperature**2 * kl(log_p, log_q, p, out=scratch).sum()
        slope = tile.difference(q, p)  # gradient with respect to z / T, [tokens, vocabulary]
        # z does not depend on the scale of the logits (nor on a constant), so the component along z is removed
        with tile.borrow(z) as scratch:
            along = scratch.copy_(slope).mul_(z).mean(-1, keepdim=True)  # [tokens, 1]
        return value, slope.addcmul_(z, along, value=-1).mul_(temperature * per_std)


def standardized_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> LossTerm:
    """KL(teacher || student) of standardised logits times temperature squared, summed over the counted tokens.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary]; standardised and compared over the vocabulary that both models have.
        mask: [...], True for the positions that are counted.
        temperature: divisor of both standardised logits; 1 is off.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (standardized(logits[..., :shared].float()) for logits in (student_logits, teacher_logits))
    return forward_kl(student, teacher, mask, temperature=temperature)


def standardized(logits: Tensor) -> Tensor:
    """Standardise to mean 0 and variance 1 over the last dimension; logits that are all equal become 0."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + _VARIANCE).rsqrt()


def _standardized(tile: LogitTile, logits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`standardized` in memory of the tile's workspace, and 1 / standard deviation, [tokens, 1]."""
    centred = tile.difference(logits, logits.mean(-1, keepdim=True))  # [tokens, vocabulary]
    with tile.borrow(centred) as scratch:
        square = scratch.copy_(centred).square_().sum(-1)  # [tokens]
    per_std = (square.unsqueeze(-1) / logits.shape[-1] + _VARIANCE).rsqrt()
    return centred.mul_(per_std), per_std
