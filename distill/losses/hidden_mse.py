"""Mean square between hidden states: the student computes what the teacher computes, layer by layer.

    loss = mean_c (h_c - t_c)^2 / s,   s = mean_c t_c^2 (scale: teacher) or 1 (scale: none)

of each token, where h is the student's hidden state after a layer (projected where it is narrower) and t the teacher's.
Divided by the teacher's own power it is 1 for a student that says 0, in every layer and model. Undivided it is that
of the papers: in large decoders a few channels of the first token, thousands of times the others, are then most of it.

Prefer it for a student that was cut out of its teacher, whose states still lie in the teacher's own basis; where the
student's width is smaller by much, :mod:`hidden_cosine <distill.losses.hidden_cosine>` asks for less.

Source: Romero et al. 2014, arXiv 1412.6550; Jiao et al. 2019, arXiv 1909.10351 (transformers, one linear map).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill.losses.base import LossTerm, masked_sum
from distill.losses.states import HiddenLossSpec

if TYPE_CHECKING:
    from torch import Tensor


class HiddenMSE(HiddenLossSpec):
    """Mean squared difference of hidden states, layer by layer; beside a loss on the logits."""

    kind: Literal["hidden_mse"] = "hidden_mse"
    scale: Literal["teacher", "none"] = "teacher"
    """What a token's squared difference is divided by: the mean square of the teacher's state, or nothing."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, documents: Tensor | None = None) -> LossTerm:
        return hidden_mse(student, teacher, mask, scale=self.scale)


def hidden_mse(
    student: Tensor, teacher: Tensor, mask: Tensor, *, scale: Literal["teacher", "none"] = "teacher"
) -> LossTerm:
    """Mean squared difference over the channels, summed over the masked-in tokens.

    Args:
        student: [..., channels].
        teacher: [..., channels].
        mask: [...], True where a token counts.
        scale: "teacher" divides by the mean square of the teacher's state, token by token.
    """
    target = teacher.float()
    value = (student.float() - target).square().mean(-1)
    if scale == "teacher":
        value = value / target.square().mean(-1).clamp(min=1e-12)
    return masked_sum(value, mask)
