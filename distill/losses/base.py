"""The contract of a loss: it returns the sum over tokens and their number, in fp32 log-space, and never a mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from distill.core.spec import Spec
from distill.losses.schedule import Schedule, Weight
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.tile import InPlace, LogitTile


class AnyLossSpec(Spec):
    """Base class of all losses. A loss is used if the recipe names it.

    Each numeric setting may be a :class:`~distill.losses.schedule.Schedule`. Such a loss must not be
    called itself: call the copy that :meth:`at` returns.
    """

    needs_teacher: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    """Whether the loss reads the next token of the text. On-policy samples have no such token."""

    compares: ClassVar[Literal["distributions", "values"]] = "distributions"
    """Kind of the heads' outputs: logits of a distribution, or plain numbers such as scores and embeddings."""

    kind: str
    weight: Weight = 1.0
    """Factor of this loss in the weighted sum that is minimised; the logged values are unweighted. Like every number of
    a loss, it may follow a schedule: {kind: linear, start: 1, end: 0.3} (or cosine; with share: 0.5 it reaches the end
    value half-way)."""

    def schedules(self) -> dict[str, Schedule]:
        """The settings that change during the run, by name."""
        return {name: value for name, value in self if isinstance(value, Schedule)}

    def at(self, step: int, num_steps: int) -> Self:
        """A copy of this loss with the value of each schedule at optimizer step ``step`` (from 0) of ``num_steps``."""
        now = {name: schedule.at(step, num_steps) for name, schedule in self.schedules().items()}
        return self.model_copy(update=now) if now else self


class LossSpec(AnyLossSpec):
    """A loss on logits. The losses on hidden states are :class:`~distill.losses.layer_losses.StateLossSpec`."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        """Compute the loss of a batch or of a chunk of tokens.

        Args:
            student_logits: [..., student vocabulary].
            teacher_logits: [..., teacher vocabulary], or None for a loss that needs no teacher.
            targets: [...], ids of the next tokens.
            mask: [...], True for the positions that are counted.
        """
        raise NotImplementedError

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        """Compute the loss of a tile of tokens and its gradient with respect to the student's logits.

        Training calls this method and not :meth:`__call__`. The default implementation differentiates the loss with
        autograd. A loss may override it with the closed form of its gradient, which takes a fraction of the time; the
        contract tests compare the two.

        The method may read all tensors of the tile. It may overwrite only memory that it has taken from the tile (see
        the top of :mod:`distill.losses.tile`).

        Returns:
            The sum over the tokens (scalar), and the gradient [tokens, vocabulary], where vocabulary is that of the
            student or the part that both models have. The gradient stays valid until the next tile.
        """
        import torch

        # copies, because autograd cannot save tensors that were created in inference mode
        with torch.inference_mode(False), torch.enable_grad():
            student = tile.student.clone().requires_grad_()  # [tokens, student vocabulary]
            teacher = None if tile.teacher is None else tile.teacher.clone()  # [tokens, teacher vocabulary]
            on = torch.ones_like(tile.targets, dtype=torch.bool)  # [tokens]
            value = self(student, teacher, tile.targets.clone(), on).sum
            return value.detach(), torch.autograd.grad(value, student)[0]

    @property
    def has_in_place(self) -> bool:
        """Whether :meth:`in_place` exists for these settings. ``in_place`` needs memory for one tile only."""
        return False

    def in_place(self, tile: LogitTile) -> InPlace:
        """Compute the same loss, and overwrite the student's logits with its gradient.

        This is called instead of :meth:`value_and_gradient`, because it is faster, if :attr:`has_in_place` is True, the
        step has only one loss, and the teacher's logits are dense (``tile.teacher`` is not None). It overwrites both
        logits of the tile: the student's, over the vocabulary that both models have, with the gradient. So the tile
        cannot be read afterwards.
        """
        raise NotImplementedError(f"{self.kind} has no form that overwrites the logits")


def shared_log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities in fp32 over the vocabulary that both heads have.

    Heads of models with the same tokenizer may be padded to different widths. The padding is cut off, and not filled
    with zeros, because a zero logit is a real probability.

    Args:
        student_logits: [..., student vocabulary].
        teacher_logits: [..., teacher vocabulary].
        temperature: divisor of both logits.

    Returns:
        The student's and the teacher's log-probabilities, [..., shared vocabulary].
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = (student_logits[..., :shared].float() / temperature).log_softmax(-1)
    teacher = (teacher_logits[..., :shared].float() / temperature).log_softmax(-1)
    return student, teacher


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q) without leaving log-space, [..., vocabulary]; 0 < share < 1."""
    return (log_p + math.log(share)).logaddexp(log_q + math.log1p(-share))


def masked_sum(values: Tensor, mask: Tensor) -> LossTerm:
    """Sum ``values`` [...] where ``mask`` [...] is True; the sum has a graph even if no element is True.

    A floating-point mask contains weights: each value is multiplied by its weight, and the count is the sum of the
    weights. Values with weight 0 are ignored even if they are not finite.
    """
    if mask.is_floating_point():
        return LossTerm((values.masked_fill(mask == 0, 0.0) * mask).sum(), mask.sum())
    return LossTerm(values.masked_fill(~mask, 0.0).sum(), mask.sum())
