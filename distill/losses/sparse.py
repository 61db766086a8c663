"""A teacher's distributions with few of their tokens kept, and the losses that are still defined on them.

Two forms. With ``tail``: k tokens and the mass of all others as one outcome more; forward KL over those k + 1 outcomes,

    sum_i p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail),   q_tail = sum of the student's other tokens,

is zero when the student is the teacher and never more than the whole KL (data processing). Without: weights that are
an unbiased estimate of p, and the exact entropy H of p,

    -H - sum_i w_i log q_i,

whose expected value and gradient are those of the whole KL; a single value may be negative.

Nothing else is: at another temperature, and in any loss that weighs tokens by the student's probability (reverse KL
and its kin), the tokens that were not kept matter one by one. Renormalising the kept ones instead teaches the student
that the others are impossible.

Source: Anshumann et al. 2025, arXiv 2503.16870, for the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from distill.losses.base import LossSpec, LossTerm, masked_sum
from distill.losses.rows import Rows, Workspace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseSignal:
    """The teacher's side of a batch, some tokens of it.

    Attributes:
        ids: tokens kept, int64 [..., k]; each once, but for those of weight 0 that fill a row up.
        probs: their probability or weight, [..., k].
        vocabulary: rows of the teacher's head.
        tail: mass of all other tokens, [...]; None when ``probs`` are an unbiased estimate of the whole.
        entropy: of the whole distribution in nats, [...]; only without ``tail``.
    """

    ids: Tensor
    probs: Tensor
    vocabulary: int
    tail: Tensor | None = None
    entropy: Tensor | None = None

    def take(self, keep: Tensor) -> SparseSignal:
        """The positions ``keep`` of the flattened batch."""

        def rows(values: Tensor | None, ends: int) -> Tensor | None:
            return None if values is None else values.flatten(0, values.ndim - 1 - ends).index_select(0, keep)

        ids, probs = rows(self.ids, 1), rows(self.probs, 1)
        assert ids is not None
        assert probs is not None
        return SparseSignal(ids, probs, self.vocabulary, rows(self.tail, 0), rows(self.entropy, 0))

    def part(self, start: int, end: int) -> SparseSignal:
        """Positions ``start`` to ``end``."""
        tail, entropy = (None if values is None else values[start:end] for values in (self.tail, self.entropy))
        return SparseSignal(self.ids[start:end], self.probs[start:end], self.vocabulary, tail, entropy)


class SparseRows(Rows):
    """A block of tokens of whose teacher only a part is known; :func:`refusal` must have let the losses through.

    Args:
        student: logits, fp32 [rows, student vocabulary].
        few: the teacher's side.
        targets: the next tokens, [rows].
        workspace: of the blocks before, whose tensors are given up.
    """

    def __init__(self, student: Tensor, few: SparseSignal, targets: Tensor, workspace: Workspace | None = None):
        super().__init__(student, None, targets, workspace)
        self.few = few

    @cached_property
    def _sparse_kl(self) -> tuple[Tensor, Tensor]:
        """:func:`sparse_forward_kl` and its gradient in the logits, a few passes over the vocabulary for both.

        kept tokens:  mass q_i - p_i        mass = sum of p_i, and p_tail where there is a tail
        the others:   mass q_j - p_tail q_j / q_tail
        """
        import torch

        width = min(self.student.shape[-1], self.few.vocabulary)
        q, log_q, _ = self._student(self.student[:, :width], 1.0)
        ids, probs, tail = _within(self.few, width)
        mass, gradient = probs.sum(-1, keepdim=True), self.copy(q)
        value = -(probs * log_q.gather(-1, ids)).sum()
        if tail is None:
            assert self.few.entropy is not None
            gradient.mul_(mass)
            value -= self.few.entropy.float().sum()
        else:
            value += torch.xlogy(probs, probs).sum()
            if ids.shape[-1] < width:
                mass = mass + tail.unsqueeze(-1)
                kept = gradient.gather(-1, ids)
                # added up: 1 - sum q would lose all digits where the student is sure
                rest = gradient.scatter_(-1, ids, 0.0).sum(-1).clamp_min_(1.2e-38)
                value += (torch.xlogy(tail, tail) - tail * rest.log()).sum()
                gradient.mul_(mass - (tail / rest).unsqueeze(-1)).scatter_(-1, ids, mass * kept)
        # an id may stand twice, with a weight of 0
        return value, gradient.scatter_add_(-1, ids, -probs)

    def value_and_gradient(self, loss: LossSpec) -> tuple[Tensor, Tensor]:
        """Of a loss, or of forward KL to what is known of the teacher."""
        return self._sparse_kl if loss.needs_teacher else loss.value_and_gradient(self)

    def kl(self) -> list[Tensor]:
        """Forward KL at T = 1 again: nothing but it can be taken from a sparse signal."""
        return [self._sparse_kl[0]]


def refusal(losses: Iterable[LossSpec]) -> str | None:
    """Why these losses cannot be taken from a sparse signal, as one line that names them; None when they can."""
    for loss in losses:
        if not loss.needs_teacher:
            continue
        if loss.kind != "forward_kl":
            return (
                f"{loss.kind} needs the teacher's whole distribution and this cache keeps a part of it; use "
                "forward_kl and cross_entropy, codec: hidden, or the teacher itself"
            )
        if getattr(loss, "temperature", 1.0) != 1.0:
            return (
                f"forward_kl at temperature {loss.temperature} needs the teacher's whole distribution "  # type: ignore[attr-defined]
                "and this cache keeps a part of it; use temperature 1, codec: hidden, or the teacher itself"
            )
    return None


def sparse_forward_kl(student_logits: Tensor, signal: SparseSignal, mask: Tensor) -> LossTerm:
    """KL(teacher || student) at T = 1 summed over the masked-in tokens, in nats; see the top of this file.

    Heads of different width are compared over the tokens that both have, as in the dense losses.

    Args:
        student_logits: [..., student vocabulary].
        signal: the teacher's side, of the same positions.
        mask: [...], True where a prediction counts.
    """
    import torch

    shared = min(student_logits.shape[-1], signal.vocabulary)
    logits = student_logits[..., :shared].float()
    ids, probs, tail = _within(signal, shared)
    total = logits.logsumexp(-1)
    log_q = logits.gather(-1, ids) - total.unsqueeze(-1)
    value = -(probs * log_q).sum(-1)
    if tail is None:
        assert signal.entropy is not None
        return masked_sum(value - signal.entropy.float(), mask)
    value = value + torch.xlogy(probs, probs).sum(-1)
    if ids.shape[-1] < shared:
        # 1 - sum q would lose all digits where the student is sure; so the others are added up
        log_rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
        value = value + torch.xlogy(tail, tail) - tail * log_rest
    return masked_sum(value, mask)


def _within(signal: SparseSignal, shared: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, probabilities and tail over the first ``shared`` tokens; those beyond are padding of the teacher's head."""
    ids, probs = signal.ids, signal.probs.float()
    tail = None if signal.tail is None else signal.tail.float()
    if shared < signal.vocabulary:
        inside = ids < shared
        probs = probs * inside
        whole = (probs.sum(-1) + (0 if tail is None else tail)).clamp(min=1e-30)
        probs = probs / whole.unsqueeze(-1)
        tail = None if tail is None else tail / whole
        # in their place one that is kept anyway, so that no other is taken out of the rest
        ids = ids.where(inside, ids.gather(-1, probs.argmax(-1, keepdim=True))).clamp(max=shared - 1)
    return ids, probs, tail
