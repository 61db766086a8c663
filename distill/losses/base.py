"""The contract of a loss: sums over tokens and their count, in fp32 log-space, never a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from distill.core.spec import Spec
from distill.losses.schedule import Schedule, Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distill.losses.rows import Rows


@dataclass(frozen=True)
class LossTerm:
    """A loss summed over the tokens that count, and how many they are.

    Sums add up over chunks, micro-batches and ranks; means do not. So every loss returns this, and only
    :meth:`per_token` divides.

    Attributes:
        sum: scalar, fp32; nats where the loss compares distributions.
        count: scalar, number of tokens in the sum.
    """

    sum: Tensor
    count: Tensor

    def __add__(self, other: LossTerm) -> LossTerm:
        return LossTerm(self.sum + other.sum, self.count + other.count)

    def detach(self) -> LossTerm:
        """The same term without a graph, to be logged."""
        return LossTerm(self.sum.detach(), self.count.detach())

    def to(self, device: torch.device) -> LossTerm:
        """The same term elsewhere."""
        return LossTerm(self.sum.to(device), self.count.to(device))

    def per_token(self) -> Tensor:
        """The loss per token; 0 when no token counts. The one line in the project that divides a loss."""
        return self.sum / self.count.clamp(min=1)


class AnyLossSpec(Spec):
    """What every loss has: a kind and a weight. A loss is on when it is named.

    Every number among its settings may follow a :class:`~distill.losses.schedule.Schedule`; such a loss is called only
    after :meth:`at`.
    """

    needs_teacher: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    """Whether it looks at the text's next token, which a sequence of the student's own does not have."""

    kind: str
    weight: Weight = 1.0
    """Factor of this loss in the sum that is trained on; every loss is logged unweighted. May follow a schedule, as all
    numbers of a loss: {kind: linear, start: 1, end: 0.3} (or cosine; share: 0.5 ends it half-way)."""

    def schedules(self) -> dict[str, Schedule]:
        """The settings that change during the run, by name."""
        return {name: value for name, value in self if isinstance(value, Schedule)}

    def at(self, step: int, num_steps: int) -> Self:
        """This loss as it is at optimizer step ``step`` (from 0) of ``num_steps``: numbers only."""
        now = {name: schedule.at(step, num_steps) for name, schedule in self.schedules().items()}
        return self.model_copy(update=now) if now else self


class LossSpec(AnyLossSpec):
    """A loss on what the models predict; the other kind is :class:`~distill.losses.states.StateLossSpec`."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, mask: Tensor
    ) -> LossTerm:
        """The loss of one batch or chunk.

        Args:
            student_logits: [..., student vocabulary].
            teacher_logits: [..., teacher vocabulary], or None for a loss that needs no teacher.
            targets: [...], the next tokens.
            mask: [...], True where a prediction counts.
        """
        raise NotImplementedError

    def value_and_gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The same loss summed over a block of tokens, and its gradient in the student's logits: what training runs.

        A loss may override this with the closed form of its gradient, which takes a fraction of the time; the contract
        tests hold the two against each other. Without it autograd differentiates the loss through the logits.

        Returns:
            the sum, a scalar, and a new tensor [rows, vocabulary]: the student's, or the narrower one that both have.
        """
        import torch

        # copies, as autograd saves no tensor that was made under inference_mode
        with torch.inference_mode(False), torch.enable_grad():
            student = rows.student.clone().requires_grad_()
            teacher = None if rows.teacher is None else rows.teacher.clone()
            on = torch.ones_like(rows.targets, dtype=torch.bool)
            value = self(student, teacher, rows.targets.clone(), on).sum
            return value.detach(), torch.autograd.grad(value, student)[0]


def shared_log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities in fp32 over the tokens that both heads have.

    Heads of one tokenizer may be padded to different widths; the padding carries no token, so it is cut off, not
    filled with zeros (a zero logit is a real probability).

    Returns:
        student and teacher log-probabilities, [..., shared vocabulary].
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = (student_logits[..., :shared].float() / temperature).log_softmax(-1)
    teacher = (teacher_logits[..., :shared].float() / temperature).log_softmax(-1)
    return student, teacher


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each token: [..., vocabulary] twice -> [...], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), without leaving log-space; 0 < share < 1."""
    return (log_p + math.log(share)).logaddexp(log_q + math.log1p(-share))


def masked_sum(values: Tensor, mask: Tensor) -> LossTerm:
    """Sum ``values`` [...] where ``mask`` [...] is True; still joined to the graph when nothing is."""
    return LossTerm(values.masked_fill(~mask, 0.0).sum(), mask.sum())
