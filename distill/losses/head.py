"""The output head and the losses, a chunk of tokens at a time, so that tokens x vocabulary never exists at once.

Each chunk's gradient is taken as soon as its loss is known, so memory is O(chunk x vocabulary) and nothing is
recomputed: the losses write their gradient over the student's logits, a block of rows at a time, and the head turns
it into those of the hidden states and of its own parameters (:mod:`projection <distill.losses.projection>`), whatever
head it is. Masked positions are dropped before a head is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.base import LossSpec, LossTerm
from distill.losses.chunks import numbers_at_once, tokens_at_once
from distill.losses.projection import CalledProjection, LinearProjection, projection
from distill.losses.rows import Rows, Workspace
from distill.losses.schedule import number
from distill.losses.sparse import SparseRows, SparseSignal

KL = "kl"
"""Name under which KL(teacher || student) at T = 1 is always reported, so that runs compare."""


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits.

    Attributes:
        logits: [tokens, hidden] -> [tokens, vocabulary]; calls the model's own head module.
        parameters: what of the head may be trained (a frozen head costs no gradient).
    """

    logits: Callable[[Tensor], Tensor]
    parameters: tuple[torch.nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Signal:
    """The teacher's side of a batch: its final hidden states [batch, sequence, hidden] and its head.

    The hidden states may be on another device than the student's; the head's logits are on the student's.
    """

    hidden: Tensor
    head: Head

    def take(self, keep: Tensor) -> Signal:
        """The positions ``keep`` of the flattened batch."""
        return Signal(self.hidden.flatten(0, 1).index_select(0, keep.to(self.hidden.device)), self.head)


def head_losses(
    hidden: Tensor,
    head: Head,
    signal: Signal | SparseSignal | None,
    targets: Tensor,
    mask: Tensor,
    losses: Sequence[tuple[str, LossSpec]],
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, LossTerm]]:
    """The weighted sum of all losses over a batch, ready for backward, and every term apart.

    Args:
        hidden: the student's final hidden states, [batch, sequence, hidden].
        head: the student's head.
        signal: the teacher's side, whole or sparse, or None when there is no teacher.
        targets: the next tokens, [batch, sequence].
        mask: True where a prediction counts, [batch, sequence].
        losses: (name, loss) pairs; the weight is the loss's own, a number by now.
        chunk_tokens: tokens whose logits exist at once; None: what suits the vocabulary.

    Returns:
        The weighted sum over tokens (scalar, fp32, differentiable in ``hidden`` and the head's parameters) and the
        unweighted terms by name, without graph, with ``kl`` at T = 1 among them when there is a teacher.
    """
    # index_select by positions, not a boolean mask, so that hidden states and targets share one lookup
    keep = mask.flatten().nonzero().squeeze(1)
    student_hidden = hidden.flatten(0, 1).index_select(0, keep)
    vocabulary = max((side for p in head.parameters for side in p.shape), default=2**15)
    chunk = chunk_tokens or tokens_at_once(vocabulary, len(keep), on_cpu=hidden.device.type == "cpu")
    signal = signal.take(keep) if signal is not None else None
    blocks = _blocks(signal, targets.flatten().index_select(0, keep), chunk, alone=len(losses) == 1)
    learn = torch.is_grad_enabled()  # inside the Function it is always off

    def losses_of(logits: Tensor, start: int) -> Iterator[list[Tensor]]:
        return (_losses_of_block(rows, losses, learn) for rows in blocks(logits, start))

    names = [*(name for name, _ in losses), *([KL] if signal is not None else [])]
    student = projection(head.logits, head.parameters, student_hidden, min(chunk, len(keep)), learn)
    sums = _Chunked.apply(losses_of, len(names), student, chunk, learn, student_hidden, *head.parameters)
    count = torch.tensor(len(keep), device=hidden.device)
    return sums[0], {name: LossTerm(value, count) for name, value in zip(names, sums[1:], strict=True)}


def _blocks(
    teacher: Signal | SparseSignal | None, targets: Tensor, chunk_tokens: int, *, alone: bool
) -> Callable[[Tensor, int], Iterator[Rows]]:
    """What cuts a chunk's logits, from token ``start`` on, into rows with the teacher's side beside them."""
    dense = teacher if isinstance(teacher, Signal) else None
    with torch.autocast(targets.device.type, enabled=False):
        # a plain head in its own precision, whatever that of training is; any other decides when it is called
        head = projection(dense.head.logits, (), dense.hidden, chunk_tokens, False) if dense else None
    workspace = Workspace()

    def blocks(logits: Tensor, start: int) -> Iterator[Rows]:
        theirs = head.forward(dense.hidden[start : start + len(logits)]) if dense and head else None
        size = _rows_at_once(logits)
        for first in range(0, len(logits), size):
            ours = logits[first : first + size]
            begin, end = start + first, start + first + len(ours)
            if isinstance(teacher, SparseSignal):
                yield SparseRows(ours, teacher.part(begin, end), targets[begin:end], workspace)
            else:
                block = None if theirs is None else theirs[first : first + size]
                yield Rows(ours, block, targets[begin:end], workspace, alone=alone)

    return blocks


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose losses are taken together."""
    numbers = numbers_at_once(torch.get_num_threads(), on_cpu=logits.device.type == "cpu")
    return max(1, numbers // logits.shape[-1])


def _losses_of_block(rows: Rows, losses: Sequence[tuple[str, LossSpec]], learn: bool) -> list[Tensor]:
    """Weighted total, each loss, KL where there is a teacher; the total's gradient replaces the student's logits."""
    found = [rows.value_and_gradient(loss) for _, loss in losses]
    weights = [number(loss.weight) for _, loss in losses]
    total = [weight * value for weight, (value, _) in zip(weights, found, strict=True)]
    sums = [torch.stack(total).sum(), *(value for value, _ in found), *rows.kl()]
    if learn:
        _add_up([gradient for _, gradient in found], weights, rows.student)
    return sums


def _add_up(gradients: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Weighted sum of gradients [rows, vocabulary or what is shared of it]; a token beyond what is shared has none."""
    widths = [gradient.shape[-1] for gradient in gradients]
    if weights[0] != 1 or gradients[0].data_ptr() != out.data_ptr():  # it may have been written where it belongs
        torch.mul(gradients[0], weights[0], out=out[:, : widths[0]])
    out[:, widths[0] :].zero_()
    for gradient, weight, width in zip(gradients[1:], weights[1:], widths[1:], strict=True):
        out[:, :width].add_(gradient, alpha=weight)


class _Chunked(torch.autograd.Function):
    """Loss and gradient in the same pass; backward only scales what forward has kept."""

    @staticmethod
    def forward(
        ctx: Any,
        losses_of: Callable[[Tensor, int], Iterator[list[Tensor]]],
        num_terms: int,
        head: LinearProjection | CalledProjection,
        chunk: int,
        learn: bool,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        sums = [hidden.new_zeros((), dtype=torch.float32) for _ in range(1 + num_terms)]
        # fp32, because in bf16 a sum over many chunks loses the small ones
        ctx.grads = [
            torch.zeros_like(leaf, dtype=torch.float32) if learn and leaf.requires_grad else None
            for leaf in (hidden, *parameters)
        ]
        ctx.dtypes = [leaf.dtype for leaf in (hidden, *parameters)]
        of_hidden, *of_parameters = ctx.grads
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = head.forward(hidden[rows])
            for values in losses_of(logits, start):
                for sum_, value in zip(sums, values, strict=True):
                    sum_ += value
            if any(grad is not None for grad in ctx.grads):
                head.backward(hidden[rows], logits, [None if of_hidden is None else of_hidden[rows], *of_parameters])
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError("backward through the chunked head a second time; give retain_graph=True to the first")
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grads = [None if grad is None else grad * grad_total for grad in grads]
        else:
            # in place: the head's gradient is large, and nobody asks for it again
            ctx.grads = None
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_total)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (None,) * 5 + tuple(None if grad is None else grad.to(dtype) for grad, dtype in pairs)
