"""Sparse teacher distributions, of which only some tokens are stored, and the loss that is defined on them.

There are two forms. With ``tail``, k tokens are stored, and the probability mass of all other tokens is one additional
outcome. Forward KL over these k + 1 outcomes,

    sum_i p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail),   q_tail = the student's mass of the other tokens,

is zero if student and teacher are equal, and never exceeds the full KL (data processing inequality). Without ``tail``,
the weights w are an unbiased estimate of p, and the exact entropy H of p is stored too. Then

    -H - sum_i w_i log q_i

has the same expected value and expected gradient as the full KL; a single value may be negative.

Other losses are not defined on sparse signals: at another temperature, and in every loss that weights tokens by the
student's probability (such as reverse KL), all tokens contribute. Renormalising the stored probabilities instead would
teach the student that all other tokens are impossible.

Source: Anshumann et al. 2025, arXiv 2503.16870, for the second form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from distill.losses.base import LossSpec, masked_sum
from distill.losses.tile import LogitTile, Workspace
from distill.numerics.kl import kl
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseSignal:
    """A part of the teacher's distribution for each token of a batch.

    Attributes:
        ids: ids of the stored tokens, int64 [..., k]. Each id is unique, except for padding, which has weight 0.
        probs: probabilities or weights of these tokens, [..., k].
        vocabulary: number of rows of the teacher's head.
        tail: probability mass of all other tokens, [...]; None if ``probs`` are an unbiased estimate.
        entropy: entropy of the whole distribution in nats, [...]; only used without ``tail``.
    """

    ids: Tensor
    probs: Tensor
    vocabulary: int
    tail: Tensor | None = None
    entropy: Tensor | None = None

    def take(self, keep: Tensor) -> SparseSignal:
        """The positions ``keep`` of the flattened batch."""

        def taken(values: Tensor) -> Tensor:
            """[batch, sequence, k] -> [tokens, k], and [batch, sequence] -> [tokens]."""
            return values.flatten(0, 1).index_select(0, keep)

        tail, entropy = (None if values is None else taken(values) for values in (self.tail, self.entropy))
        return SparseSignal(taken(self.ids), taken(self.probs), self.vocabulary, tail, entropy)

    def part(self, start: int, end: int) -> SparseSignal:
        """Positions ``start`` to ``end`` (exclusive)."""
        tail, entropy = (None if values is None else values[start:end] for values in (self.tail, self.entropy))
        return SparseSignal(self.ids[start:end], self.probs[start:end], self.vocabulary, tail, entropy)


class SparseTile(LogitTile):
    """A tile with a sparse teacher signal. :func:`refusal` must have accepted the losses.

    Args:
        student: the student's logits, fp32 [tokens, student vocabulary].
        few: sparse teacher signal of the same tokens.
        targets: ids of the next tokens, int64 [tokens].
        workspace: workspace of the previous tile. All tensors of that tile become invalid.
    """

    def __init__(self, student: Tensor, few: SparseSignal, targets: Tensor, workspace: Workspace | None = None):
        super().__init__(student, None, targets, workspace)
        self.few = few

    @cached_property
    def forward_kl_and_gradient(self) -> tuple[Tensor, Tensor]:
        """:func:`sparse_forward_kl` of the tile, and its gradient with respect to the logits.

            stored tokens:  mass * q_i - p_i        mass = sum of p_i, plus p_tail if there is a tail
            other tokens:   mass * q_j - p_tail * q_j / q_tail

        Returns:
            The sum over the tokens (scalar), and the gradient [tokens, shared vocabulary], which is read only.
        """
        width = min(self.student.shape[-1], self.few.vocabulary)
        q, log_q, _ = self._student(self.student[:, :width], 1.0)  # [tokens, shared vocabulary]
        ids, probs, tail = _within(self.few, width)  # [tokens, k], [tokens, k], [tokens] or None
        mass, gradient = probs.sum(-1, keepdim=True), self.copy(q)  # [tokens, 1], [tokens, shared vocabulary]
        log_rest = None
        if tail is None:
            gradient.mul_(mass)
        elif ids.shape[-1] < width:
            mass = mass + tail.unsqueeze(-1)
            kept = gradient.gather(-1, ids)  # [tokens, k]
            # summed, because 1 - sum q loses all digits if the stored tokens have nearly all of the student's mass
            rest = gradient.scatter_(-1, ids, 0.0).sum(-1).clamp_min_(1.2e-38)  # q_tail, [tokens]
            log_rest = rest.log()
            gradient.mul_(mass - (tail / rest).unsqueeze(-1)).scatter_(-1, ids, mass * kept)
        value = _kl_of_kept(probs, log_q.gather(-1, ids), tail, log_rest, self.few.entropy).sum()
        # added, because an id may occur twice (with weight 0)
        return value, gradient.scatter_add_(-1, ids, -probs)

    def kl(self) -> list[Tensor]:
        """Forward KL at temperature 1, which is the only loss of a sparse signal."""
        return [self.forward_kl_and_gradient[0]]


def refusal(losses: Iterable[LossSpec]) -> str | None:
    """The reason, in one line, why one of these losses cannot be computed from a sparse signal; None if all can."""
    for loss in losses:
        if not loss.needs_teacher:
            continue
        if loss.kind != "forward_kl":
            return (
                f"{loss.kind} needs the teacher's whole distribution and this cache stores only a part of "
                "it; use forward_kl and cross_entropy, codec: hidden, or a live teacher"
            )
        if getattr(loss, "temperature", 1.0) != 1.0:
            return (
                f"forward_kl at temperature {loss.temperature} needs the teacher's whole distribution "  # type: ignore[attr-defined]
                "and this cache stores only a part of it; use temperature 1, codec: hidden, or a live teacher"
            )
    return None


def sparse_forward_kl(student_logits: Tensor, signal: SparseSignal, mask: Tensor) -> LossTerm:
    """KL(teacher || student) at temperature 1, summed over the counted tokens, in nats; see the top of this file.

    Heads of different widths are compared over the vocabulary that both have, as in the dense losses.

    Args:
        student_logits: [..., student vocabulary].
        signal: sparse teacher signal of the same positions.
        mask: [...], True for the positions that are counted.
    """
    import torch

    shared = min(student_logits.shape[-1], signal.vocabulary)
    logits = student_logits[..., :shared].float()
    ids, probs, tail = _within(signal, shared)  # [..., k], [..., k], [...] or None
    total = logits.logsumexp(-1)  # [...]
    log_q = logits.gather(-1, ids) - total.unsqueeze(-1)  # [..., k]
    log_rest = None
    if tail is not None and ids.shape[-1] < shared:
        # summed, because 1 - sum q loses all digits if the stored tokens have nearly all of the student's mass
        log_rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total  # log q_tail, [...]
    return masked_sum(_kl_of_kept(probs, log_q, tail, log_rest, signal.entropy), mask)


def _kl_of_kept(
    probs: Tensor, log_q: Tensor, tail: Tensor | None, log_rest: Tensor | None, entropy: Tensor | None
) -> Tensor:
    """Sparse forward KL per token, [...], in nats.

    Args:
        probs: the teacher's probabilities of the stored tokens, [..., k].
        log_q: the student's log-probabilities of the same tokens, [..., k].
        tail: the teacher's probability mass of all other tokens, [...]; None for an unbiased estimate.
        log_rest: logarithm of the student's mass of all other tokens, [...]; None if all tokens are stored.
        entropy: entropy of the teacher's distribution, [...]; only used if ``tail`` is None.
    """
    import torch

    if tail is None:
        assert entropy is not None
        return -(probs * log_q).sum(-1) - entropy.float()
    if log_rest is not None:  # the other tokens together are one additional outcome
        probs = torch.cat([probs, tail.unsqueeze(-1)], -1)  # [..., k + 1]
        log_q = torch.cat([log_q, log_rest.unsqueeze(-1)], -1)
        # an outcome with probability 0 contributes nothing; its logarithm only has to be finite
    return kl(probs.log().masked_fill(probs == 0, 0.0), log_q, probs)


def _within(signal: SparseSignal, shared: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, probabilities and tail within the first ``shared`` columns; the others are padding of the teacher's head.

    Returns:
        ids [..., k], probabilities [..., k], and tail [...] or None.
    """
    ids, probs = signal.ids, signal.probs.float()
    tail = None if signal.tail is None else signal.tail.float()
    if shared < signal.vocabulary:
        inside = ids < shared
        probs = probs * inside
        # the remaining mass is renormalised, [...]
        whole = (probs.sum(-1) + (0 if tail is None else tail)).clamp(min=1e-30)
        probs = probs / whole.unsqueeze(-1)
        tail = None if tail is None else tail / whole
        # an id out of range is replaced by that of the likeliest token with weight 0, so that it removes no other token
        # from the tail
        ids = ids.where(inside, ids.gather(-1, probs.argmax(-1, keepdim=True))).clamp(max=shared - 1)
    return ids, probs, tail
