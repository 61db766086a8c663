"""Mean squared error between hidden states: the student learns to reproduce the teacher's states, layer by layer.

    loss = mean_c (h_c - t_c)^2 / s,   s = mean_c t_c^2 (scale: teacher) or 1 (scale: none)

per token, where h is the student's hidden state after a layer (projected if the widths differ) and t the teacher's.
With scale: teacher, the loss is 1 for a student whose states are 0, in every layer and model. scale: none is the loss
of the papers; in large decoders it is dominated by a few channels of the first token, which are thousands of times as
large as the others.

Prefer it for a student that was pruned from its teacher, because its hidden states are still in the teacher's basis. If
the student is much narrower, :mod:`hidden_cosine <distill.losses.hidden_cosine>` is less strict.

Source: Romero et al. 2014, arXiv 1412.6550; Jiao et al. 2019, arXiv 1909.10351 (transformers, one linear map).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import masked_sum
from distill.losses.layer_losses import HiddenLossSpec
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


class HiddenMSE(HiddenLossSpec):
    """Mean squared difference of hidden states, layer by layer; used in addition to a loss on logits."""

    kind: Literal["hidden_mse"] = "hidden_mse"
    scale: Literal["teacher", "none"] = "teacher"
    """Divisor of the squared difference of a token: the mean square of the teacher's state, or 1 (none)."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        return hidden_mse(student, teacher, mask, scale=self.scale)


def hidden_mse(
    student: Tensor, teacher: Tensor, mask: Tensor, *, scale: Literal["teacher", "none"] = "teacher"
) -> LossTerm:
    """Mean squared difference over the channels, summed over the counted tokens.

    Args:
        student: [..., channels].
        teacher: [..., channels].
        mask: [...], True for the tokens that are counted.
        scale: "teacher" divides by the mean square of the teacher's state, per token.
    """
    target = teacher.float()  # [..., channels]
    value = (student.float() - target).square().mean(-1)
    if scale == "teacher":
        value = value / target.square().mean(-1).clamp(min=1e-12)
    return masked_sum(value, mask)
