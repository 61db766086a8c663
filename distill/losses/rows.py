"""A block of tokens whose logits exist now, what the losses of a step share of it, and the memory to compute in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.base import LossSpec


class Softmax(NamedTuple):
    """A distribution over the last dimension, fp32.

    Attributes:
        probs: [rows, vocabulary].
        log_probs: their logarithms, exact also where ``probs`` is 0 in fp32.
        log_sum: logarithm of the sum of all powers, [rows, 1].
    """

    probs: Tensor
    log_probs: Tensor
    log_sum: Tensor


class Pair(NamedTuple):
    """Student ``q`` and teacher ``p`` at one temperature over the tokens that both have, [rows, shared vocabulary]."""

    q: Tensor
    log_q: Tensor
    p: Tensor
    log_p: Tensor


class Workspace:
    """Memory for what is computed of a block, used again for the next one.

    On a CPU fresh memory costs more than the arithmetic in it: a page fault every 4 KiB.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, list[Tensor]] = {}
        self._num_taken: dict[int, int] = {}

    def begin(self) -> None:
        """Nothing that was handed out is needed any longer."""
        self._num_taken.clear()

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor [rows, vocabulary] of the size of this one, with anything in it."""
        rows, width = tensor.shape
        tensors, index = self._tensors.setdefault(width, []), self._num_taken.get(width, 0)
        if index == len(tensors):
            tensors.append(tensor.new_empty(rows, width))
        elif len(tensors[index]) < rows:
            tensors[index] = tensor.new_empty(rows, width)
        self._num_taken[width] = index + 1
        return tensors[index][:rows]

    def take_back(self, tensor: Tensor) -> None:
        """The tensor that was handed out last is needed no longer: the next one is it, while it is still near."""
        self._num_taken[tensor.shape[-1]] -= 1


class Rows:
    """A block of tokens, small enough that what is computed of it stays in the processor's cache.

    Distributions are computed once and shared, so nobody writes to them; what :meth:`difference`, :meth:`copy` and
    :meth:`mixture` return belongs to the caller until the next block.

    Args:
        student: logits, fp32 [rows, student vocabulary]. These and the teacher's are overwritten by log-probabilities,
            which are as good: the same up to a constant of each row.
        teacher: logits, fp32 [rows, teacher vocabulary]; None when there is none, or only a part of it.
        targets: the next tokens, [rows].
        workspace: of the blocks before, whose tensors are given up.
        alone: one loss only reads them, so that it may write over both logits.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        workspace: Workspace | None = None,
        *,
        alone: bool = False,
    ):
        self.student, self.teacher, self.targets, self.alone = student, teacher, targets, alone
        self._workspace = workspace or Workspace()
        self._workspace.begin()
        self._students: dict[tuple[int, float], Softmax] = {}
        self._pairs: dict[float, Pair] = {}
        self._forward_kl: dict[float, Tensor] = {}

    def shared(self) -> tuple[Tensor, Tensor]:
        """Both logits over the tokens that both heads have; what a padded head has beyond carries no token."""
        assert self.teacher is not None
        width = min(self.student.shape[-1], self.teacher.shape[-1])
        return self.student[:, :width], self.teacher[:, :width]

    def own(self) -> Softmax:
        """The student over all of its own vocabulary, T = 1."""
        return self._student(self.student, 1.0)

    def pair(self, temperature: float) -> Pair:
        """Both models over the tokens that both have."""
        if temperature not in self._pairs:
            student, teacher = self.shared()
            q, log_q, _ = self._student(student, temperature)
            p, log_p, _ = self.softmax(teacher, temperature, in_place=temperature == 1.0)
            self._pairs[temperature] = Pair(q, log_q, p, log_p)
        return self._pairs[temperature]

    def forward_kl(self, temperature: float) -> Tensor:
        """KL(teacher || student) of each row, [rows], nats."""
        if temperature not in self._forward_kl:
            _, log_q, p, log_p = self.pair(temperature)
            self._forward_kl[temperature] = self.total(self.difference(log_p, log_q).mul_(p))
        return self._forward_kl[temperature]

    def forward_kl_in_place(self) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) at T = 1, its sum and its gradient, written over both logits.

        What is left of the default loss after the matrix products is memory traffic: this takes 12 passes over 3
        tensors where the shared distributions take 17 over 5.
        """
        student, teacher = self.shared()
        student.sub_(student.amax(-1, keepdim=True))
        teacher.sub_(teacher.amax(-1, keepdim=True))
        gap = self.difference(teacher, student)
        q_sum = student.exp_().sum(-1, keepdim=True)
        p_sum = teacher.exp_().sum(-1, keepdim=True)
        kl = gap.mul_(teacher).sum(-1, keepdim=True) / p_sum - (p_sum / q_sum).log()
        self._forward_kl[1.0] = kl.squeeze(-1)
        return kl.sum(), student.mul_(1 / q_sum).addcmul_(teacher, -1 / p_sum)

    def value_and_gradient(self, loss: LossSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`distill.losses.base.LossSpec.value_and_gradient`."""
        return loss.value_and_gradient(self)

    def kl(self) -> list[Tensor]:
        """Sum of KL(teacher || student) at T = 1; nothing without a teacher."""
        return [] if self.teacher is None else [self.forward_kl(1.0).sum()]

    def difference(self, left: Tensor, right: Tensor) -> Tensor:
        """``left - right``."""
        import torch

        return torch.sub(left, right, out=self._workspace.like(left))

    def copy(self, tensor: Tensor) -> Tensor:
        """The same, to be written to."""
        return self._workspace.like(tensor).copy_(tensor)

    def mixture(self, p: Tensor, q: Tensor, share: float) -> Tensor:
        """``share * p + (1 - share) * q``, never 0, so that its logarithm is finite where both are beyond fp32."""
        import torch

        return torch.mul(p, share, out=self._workspace.like(p)).add_(q, alpha=1 - share).clamp_min_(1.2e-38)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the vocabulary, [rows], of what was handed out last; its memory is given back."""
        self._workspace.take_back(tensor)
        return tensor.sum(-1)

    def softmax(self, logits: Tensor, temperature: float, *, in_place: bool = False) -> Softmax:
        """Softmax of ``logits / temperature`` and its logarithm, with one exponential for both."""
        import torch

        highest = logits.amax(-1, keepdim=True)
        log_probs = logits.sub_(highest) if in_place else self.difference(logits, highest)
        if temperature != 1.0:
            log_probs /= temperature
        probs = torch.exp(log_probs, out=self._workspace.like(log_probs))
        total = probs.sum(-1, keepdim=True)
        log_total = total.log()
        # times the inverse: a division costs twice as much
        return Softmax(probs.mul_(1 / total), log_probs.sub_(log_total), highest / temperature + log_total)

    def _student(self, logits: Tensor, temperature: float) -> Softmax:
        key = logits.shape[-1], temperature
        if key not in self._students:
            # with padding left out, what is padded would no longer fit to the rest
            whole = logits.shape == self.student.shape
            self._students[key] = self.softmax(logits, temperature, in_place=whole and temperature == 1.0)
        return self._students[key]


def through_softmax(slope: Tensor, probs: Tensor) -> Tensor:
    """Gradient in the logits from ``slope``, which holds ``probs`` times the gradient in them, and is overwritten."""
    return slope.addcmul_(probs, slope.sum(-1, keepdim=True), value=-1)
