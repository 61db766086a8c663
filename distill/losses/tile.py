"""A tile of logits: a number of tokens so small that all intermediate results of the losses stay in the CPU cache.

How it works. The output head writes the logits of a chunk of tokens (hundreds of megabytes for a large vocabulary). The
losses process them tile by tile (:func:`distill.losses.chunks.numbers_at_once`). If a step has several losses, they
share the expensive results: the softmax and log-softmax of each model at each temperature are computed once per tile.
The closed-form gradients are sums of products of these tensors, so a loss makes only a few passes over cached memory,
without autograd.

Ownership of memory. There are three kinds of tensors, and no function depends on the order in which others were called:

    both logits           belong to the tile. A distribution at temperature 1 is computed in place of the logits: they
                          become log-probabilities, which differ from the logits by a constant per token. So a loss may
                          read them at any time as logits up to a constant.
    shared distributions  (:meth:`own`, :meth:`pair`, :meth:`forward_kl`) belong to the tile; losses only read them.
    memory of one loss    (:meth:`take`, and :meth:`difference`, :meth:`copy`, :meth:`mixture`, :meth:`softmax`, which
                          call it) belongs to the loss until the next tile. Memory of :meth:`borrow` belongs to the loss
                          within the ``with`` block.

Memory layout. All tensors are fp32 and contiguous, [tokens, vocabulary]. Heads that are padded to different widths are
compared over the vocabulary that both have. A :class:`Workspace` reuses the memory for the next tile.

Why not autograd. Autograd of the plain formulas allocates and keeps about ten tensors of the size of the logits. On a
CPU, the page faults of newly allocated memory alone cost more than the arithmetic. The price of closed forms is that
every gradient is written as code in addition to the formula; the contract tests compare it with autograd in float64.

Where to add a fused kernel (CUDA, Triton). A kernel for a loss is called from ``value_and_gradient`` of that loss, or
from ``in_place`` (with ``has_in_place``) if it overwrites the logits. ``in_place`` must also return the KL for logging;
with ``value_and_gradient`` the KL is computed separately. The inputs are ``tile.student`` and ``tile.teacher``,
contiguous fp32. Keep the PyTorch formula as the fallback for other devices. No compiled extension is built today: a
Triton kernel, or one that ``torch.utils.cpp_extension`` builds, goes into the file of its loss.
``tests/contracts/test_every_loss.py`` checks its values and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from distill.numerics.kl import kl

if TYPE_CHECKING:
    from torch import Tensor


class Softmax(NamedTuple):
    """A distribution over the last dimension, fp32.

    Attributes:
        probs: probabilities, [tokens, vocabulary].
        log_probs: log-probabilities, [tokens, vocabulary]; exact even where ``probs`` underflows to 0.
        log_sum: log-sum-exp of the logits divided by the temperature, [tokens, 1].
    """

    probs: Tensor
    log_probs: Tensor
    log_sum: Tensor


class Pair(NamedTuple):
    """Student q and teacher p at one temperature, [tokens, shared vocabulary] each."""

    q: Tensor
    log_q: Tensor
    p: Tensor
    log_p: Tensor


class InPlace(NamedTuple):
    """Result of :meth:`distill.losses.base.LossSpec.in_place`, in addition to the gradient in place of the logits.

    Attributes:
        value: the loss, summed over the tile; scalar.
        kl: KL(teacher || student) at temperature 1, summed over the tile; scalar.
    """

    value: Tensor
    kl: Tensor


class Workspace:
    """Memory for the intermediate results of a tile, which is reused for the next tile.

    On a CPU, newly allocated memory costs one page fault per 4 KiB, which is more than the arithmetic.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}  # width -> tensors [any number of tokens, width]; a stack
        self._taken: list[Tensor] = []

    def begin(self) -> None:
        """Start a new tile: all memory that was taken for the last tile is free again."""
        while self._taken:
            tensor = self._taken.pop()  # in reverse order, so that each tensor gets the same purpose again
            self._free[tensor.shape[-1]].append(tensor)

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape of ``like``, [tokens, width], valid until the next :meth:`begin`."""
        whole = self._get(like)
        self._taken.append(whole)
        return whole[: len(like)]

    @contextmanager
    def borrow(self, like: Tensor) -> Iterator[Tensor]:
        """Like :meth:`take`, but only within a ``with`` block. The tensor is reused first, while it is in the cache."""
        whole = self._get(like)
        yield whole[: len(like)]
        self._free[whole.shape[-1]].append(whole)

    def _get(self, like: Tensor) -> Tensor:
        free = self._free.setdefault(like.shape[-1], [])
        tensor = free.pop() if free else None
        return tensor if tensor is not None and len(tensor) >= len(like) else like.new_empty(like.shape)


class LogitTile:
    """The logits of a tile of tokens, and the results that the losses of a step share; see the top of this file.

    Args:
        student: the student's logits, fp32 [tokens, student vocabulary].
        teacher: the teacher's logits, fp32 [tokens, teacher vocabulary]; None without a teacher or with a sparse
            signal.
        targets: ids of the next tokens, int64 [tokens].
        workspace: workspace of the previous tile. All tensors of that tile become invalid.
    """

    def __init__(self, student: Tensor, teacher: Tensor | None, targets: Tensor, workspace: Workspace | None = None):
        self.student, self.teacher, self.targets = student, teacher, targets
        self._workspace = workspace or Workspace()
        self._workspace.begin()
        self.take, self.borrow = self._workspace.take, self._workspace.borrow
        self._students: dict[tuple[int, float], Softmax] = {}
        self._pairs: dict[float, Pair] = {}
        self._forward_kl: dict[float, Tensor] = {}

    def shared(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logits (up to a constant) over the vocabulary that both heads have.

        The remaining columns of the wider head are padding. The shape of both is [tokens, shared vocabulary].
        """
        assert self.teacher is not None
        width = min(self.student.shape[-1], self.teacher.shape[-1])
        return self.student[:, :width], self.teacher[:, :width]

    def own(self) -> Softmax:
        """The student's distribution over its whole vocabulary, at temperature 1. Read only."""
        return self._student(self.student, 1.0)

    def pair(self, temperature: float) -> Pair:
        """The distributions of both models over the vocabulary that both have. Read only."""
        if temperature not in self._pairs:
            student, teacher = self.shared()
            q, log_q, _ = self._student(student, temperature)
            p, log_p, _ = self.softmax(teacher, temperature, in_place=temperature == 1.0)
            self._pairs[temperature] = Pair(q, log_q, p, log_p)
        return self._pairs[temperature]

    def forward_kl(self, temperature: float) -> Tensor:
        """KL(teacher || student) per token, [tokens], in nats. Read only."""
        if temperature not in self._forward_kl:
            _, log_q, p, log_p = self.pair(temperature)
            with self.borrow(p) as scratch:
                self._forward_kl[temperature] = kl(log_p, log_q, p, out=scratch)
        return self._forward_kl[temperature]

    def kl(self) -> list[Tensor]:
        """KL(teacher || student) at temperature 1, summed over the tile; an empty list without a teacher."""
        return [] if self.teacher is None else [self.forward_kl(1.0).sum()]

    def difference(self, left: Tensor, right: Tensor) -> Tensor:
        """``left - right``, in memory of the calling loss."""
        import torch

        return torch.sub(left, right, out=self.take(left))

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, in memory of the calling loss."""
        return self.take(tensor).copy_(tensor)

    def mixture(self, p: Tensor, q: Tensor, share: float) -> Tensor:
        """``share * p + (1 - share) * q``, in memory of the calling loss.

        The result is never 0, so that its logarithm is finite even if both probabilities underflow in fp32.
        """
        import torch

        return torch.mul(p, share, out=self.take(p)).add_(q, alpha=1 - share).clamp_min_(1.2e-38)

    def softmax(self, logits: Tensor, temperature: float, *, in_place: bool = False) -> Softmax:
        """Softmax and log-softmax of ``logits / temperature``, with one exponential for both.

        Args:
            logits: [tokens, vocabulary].
            temperature: divisor of the logits.
            in_place: whether to write the log-probabilities over ``logits``; else they are in memory of the calling
                loss.
        """
        import torch

        highest = logits.amax(-1, keepdim=True)  # [tokens, 1]
        log_probs = logits.sub_(highest) if in_place else self.difference(logits, highest)
        if temperature != 1.0:
            log_probs /= temperature
        probs = torch.exp(log_probs, out=self.take(log_probs))  # not yet normalised: their sum is ``total``
        total = probs.sum(-1, keepdim=True)  # [tokens, 1]
        log_total = total.log()
        # multiplied by the inverse, because a division costs twice as much
        return Softmax(probs.mul_(1 / total), log_probs.sub_(log_total), highest / temperature + log_total)

    def _student(self, logits: Tensor, temperature: float) -> Softmax:
        """The student's softmax over the first columns of its logits (all, or the shared vocabulary); computed once."""
        key = logits.shape[-1], temperature
        if key not in self._students:
            # in place only over the whole vocabulary: else the normalised columns would no longer fit the others
            whole = logits.shape == self.student.shape
            self._students[key] = self.softmax(logits, temperature, in_place=whole and temperature == 1.0)
        return self._students[key]


def through_softmax(slope: Tensor, probs: Tensor) -> Tensor:
    """The gradient with respect to the logits, from the gradient r with respect to the probabilities.

    It is q * (r - sum_v q_v r_v).

    Args:
        slope: q * r, [tokens, vocabulary]. It is overwritten by the result.
        probs: q, [tokens, vocabulary].
    """
    return slope.addcmul_(probs, slope.sum(-1, keepdim=True), value=-1)
