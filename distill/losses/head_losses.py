"""The output head and the losses, computed chunk by chunk, so that logits of all tokens never exist at once.

The gradient of each chunk is computed directly after its loss. So the memory is O(chunk x vocabulary), and nothing is
recomputed. For every chunk, in this order:

    1. the heads compute the logits of the student's and the teacher's hidden states (:mod:`distill.losses.projection`)
    2. the losses read them tile by tile, and the student's logits are overwritten by the gradient of the weighted sum
       (:mod:`distill.losses.tile`)
    3. the student's head computes from it the gradients of the hidden states and of its own parameters

Masked positions are removed before step 1. The backward pass only scales the gradients that the forward pass has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.base import LossSpec
from distill.losses.chunks import numbers_at_once, tokens_at_once
from distill.losses.projection import CalledProjection, LinearProjection, projection
from distill.losses.schedule import number
from distill.losses.sparse import SparseSignal, SparseTile
from distill.losses.tile import LogitTile, Workspace
from distill.numerics.term import LossTerm

KL = "kl"
"""Name of KL(teacher || student) at temperature 1, which is always logged, so that runs can be compared."""


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits.

    Attributes:
        logits: function [tokens, hidden] -> [tokens, vocabulary] that calls the model's own head module.
        parameters: parameters of the head. Gradients are computed for those that require them.
    """

    logits: Callable[[Tensor], Tensor]
    parameters: tuple[torch.nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Signal:
    """The teacher's final hidden states [batch, sequence, hidden] and its head.

    The hidden states may be on another device than the student's. The head returns logits on the student's device.
    """

    hidden: Tensor
    head: Head

    def take(self, keep: Tensor) -> Signal:
        """The positions ``keep`` [tokens] of the flattened batch; the hidden states become [tokens, hidden]."""
        return Signal(self.hidden.flatten(0, 1).index_select(0, keep.to(self.hidden.device)), self.head)


def head_losses(
    hidden: Tensor,
    head: Head,
    signal: Signal | SparseSignal | None,
    targets: Tensor,
    mask: Tensor,
    losses: Sequence[tuple[str, LossSpec]],
    *,
    kept: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, LossTerm]]:
    """Compute the weighted sum of all losses over a batch, and each unweighted loss.

    Args:
        hidden: the student's final hidden states, [batch, sequence, hidden].
        head: the student's head.
        signal: the teacher's signal, dense or sparse; None without a teacher.
        targets: ids of the next tokens, [batch, sequence].
        mask: True for the positions that are counted, [batch, sequence].
        losses: (name, loss) pairs. Their weights must be numbers, not schedules.
        kept: positions of the flattened mask where it is True, int64 [tokens]; None to find them here, which waits for
            a GPU.
        chunk_tokens: number of tokens whose logits exist at once; None to choose it by the size of the vocabulary.

    Returns:
        The weighted sum over the tokens (scalar, fp32, differentiable with respect to ``hidden`` and the parameters of
        the head), and the unweighted terms by name, without a graph. With a teacher they contain ``kl``, at temperature
        1, unless the losses compare plain values.
    """
    # index_select by positions, not a boolean mask, so that hidden states and targets share one lookup
    keep = mask.flatten().nonzero().squeeze(1) if kept is None else kept  # [tokens], positions that are counted
    student_hidden = hidden.flatten(0, 1).index_select(0, keep)  # [tokens, hidden]
    vocabulary = max((side for p in head.parameters for side in p.shape), default=2**15)
    chunk = chunk_tokens or tokens_at_once(vocabulary, len(keep), on_cpu=hidden.device.type == "cpu")
    signal = signal.take(keep) if signal is not None else None
    tiles = _tiles(signal, targets.flatten().index_select(0, keep), chunk)
    is_compared = signal is not None and all(loss.compares == "distributions" for _, loss in losses)
    learn = torch.is_grad_enabled()  # read here, because it is always off inside an autograd.Function

    def losses_of(logits: Tensor, start: int) -> Iterator[list[Tensor]]:
        return (_losses_of_tile(tile, losses, learn, is_compared) for tile in tiles(logits, start))

    names = [*(name for name, _ in losses), *([KL] if is_compared else [])]
    student = projection(head.logits, head.parameters, student_hidden, min(chunk, len(keep)), learn)
    sums = _Chunked.apply(losses_of, len(names), student, chunk, learn, student_hidden, *head.parameters)
    count = torch.full((), len(keep), dtype=torch.int64, device=hidden.device)  # torch.tensor would wait for a copy
    return sums[0], {name: LossTerm(value, count) for name, value in zip(names, sums[1:], strict=True)}


def _tiles(
    teacher: Signal | SparseSignal | None, targets: Tensor, chunk_tokens: int
) -> Callable[[Tensor, int], Iterator[LogitTile]]:
    """Return a function of the logits of a chunk and the index of its first token, which yields the chunk's tiles."""
    dense = teacher if isinstance(teacher, Signal) else None
    with torch.autocast(targets.device.type, enabled=False):
        # a plain linear head computes in its own precision, not in that of autocast
        head = projection(dense.head.logits, (), dense.hidden, chunk_tokens, False) if dense else None
    workspace = Workspace()

    def tiles(logits: Tensor, start: int) -> Iterator[LogitTile]:
        """logits: [chunk, student vocabulary]."""
        theirs = head.forward(dense.hidden[start : start + len(logits)]) if dense and head else None
        size = _tile_tokens(logits)
        for first in range(0, len(logits), size):
            ours = logits[first : first + size]  # [tile, student vocabulary]
            begin, end = start + first, start + first + len(ours)
            if isinstance(teacher, SparseSignal):
                yield SparseTile(ours, teacher.part(begin, end), targets[begin:end], workspace)
            else:
                beside = None if theirs is None else theirs[first : first + size]  # [tile, teacher vocabulary]
                yield LogitTile(ours, beside, targets[begin:end], workspace)

    return tiles


def _tile_tokens(logits: Tensor) -> int:
    """Number of tokens per tile."""
    numbers = numbers_at_once(torch.get_num_threads(), on_cpu=logits.device.type == "cpu")
    return max(1, numbers // logits.shape[-1])


def _losses_of_tile(
    tile: LogitTile, losses: Sequence[tuple[str, LossSpec]], learn: bool, is_compared: bool
) -> list[Tensor]:
    """The weighted total, each loss, and KL if there is a teacher's distribution; scalars, summed over the tile.

    If ``learn`` is True, the gradient of the total replaces the student's logits.
    """
    weights = [number(loss.weight) for _, loss in losses]
    # a single loss may have a faster form, which overwrites the tile
    if len(losses) == 1 and tile.teacher is not None and losses[0][1].has_in_place:
        fused = losses[0][1].in_place(tile)
        if learn:
            _scale_in_place(tile, weights[0])
        return [weights[0] * fused.value, fused.value, fused.kl]
    found = [_value_and_gradient(loss, tile) for _, loss in losses]
    values = [value for value, _ in found]
    total = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
    sums = [total, *values, *(tile.kl() if is_compared else ())]
    if learn:  # at the end, because the tile cannot be read afterwards
        _write_sum([gradient for _, gradient in found], weights, tile.student)
    return sums


def _value_and_gradient(loss: LossSpec, tile: LogitTile) -> tuple[Tensor, Tensor]:
    """Value and gradient of a loss. A sparse signal defines forward KL only (``sparse.refusal`` has checked this)."""
    if isinstance(tile, SparseTile) and loss.needs_teacher:
        return tile.forward_kl_and_gradient
    return loss.value_and_gradient(tile)


def _scale_in_place(tile: LogitTile, weight: float) -> None:
    """Multiply the gradient, which stands in place of the student's logits, by ``weight``; padding gets gradient 0."""
    gradient, _ = tile.shared()
    if weight != 1:
        gradient.mul_(weight)
    tile.student[:, gradient.shape[-1] :].zero_()


def _write_sum(gradients: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Write the weighted sum of gradients to ``out`` [tokens, student vocabulary].

    Each gradient is [tokens, vocabulary], where vocabulary is the student's or the shared one. Columns of the student's
    head beyond the shared vocabulary have no gradient.
    """
    width = gradients[0].shape[-1]
    torch.mul(gradients[0], weights[0], out=out[:, :width])
    out[:, width:].zero_()
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        out[:, : gradient.shape[-1]].add_(gradient, alpha=weight)


class _Chunked(torch.autograd.Function):
    """Computes the loss and the gradients in the forward pass; the backward pass only scales the gradients."""

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
        # [tokens, hidden], and the shape of each parameter; fp32, because bf16 loses small addends in long sums
        ctx.grads = [
            torch.zeros_like(leaf, dtype=torch.float32) if learn and leaf.requires_grad else None
            for leaf in (hidden, *parameters)
        ]
        ctx.dtypes = [leaf.dtype for leaf in (hidden, *parameters)]
        of_hidden, *of_parameters = ctx.grads
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head.forward(hidden[part])  # [chunk, vocabulary]
            for values in losses_of(logits, start):
                for sum_, value in zip(sums, values, strict=True):
                    sum_ += value
            if any(grad is not None for grad in ctx.grads):  # ``logits`` contains the gradient now
                head.backward(hidden[part], logits, [None if of_hidden is None else of_hidden[part], *of_parameters])
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
            # in place, because the gradient of the head is large and is not needed again
            ctx.grads = None
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_total)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (None,) * 5 + tuple(None if grad is None else grad.to(dtype) for grad, dtype in pairs)
