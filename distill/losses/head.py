"""The output head and the losses, a chunk of tokens at a time, so that tokens x vocabulary never exists at once.

The heads are called as modules: LoRA, fake-quant, tied weights and soft-caps on them act and get their gradient. Each
chunk's gradient is taken as soon as its loss is known, so memory is O(chunk x vocabulary) and nothing is recomputed.
Masked positions are dropped before a head is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.base import LossSpec, LossTerm
from distill.losses.forward_kl import forward_kl
from distill.losses.schedule import number
from distill.losses.sparse import SparseSignal, sparse_forward_kl

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
    chunk_tokens: int = 512,
) -> tuple[Tensor, dict[str, LossTerm]]:
    """The weighted sum of all losses over a batch, ready for backward, and every term apart.

    Args:
        hidden: the student's final hidden states, [batch, sequence, hidden].
        head: the student's head.
        signal: the teacher's side, whole or sparse, or None when there is no teacher.
        targets: the next tokens, [batch, sequence].
        mask: True where a prediction counts, [batch, sequence].
        losses: (name, loss) pairs; the weight is the loss's own, a number by now.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        The weighted sum over tokens (scalar, fp32, differentiable in ``hidden`` and the head's parameters) and the
        unweighted terms by name, without graph, with ``kl`` at T = 1 among them when there is a teacher.
    """
    # index_select by positions, not a boolean mask, so that hidden states and targets share one lookup
    keep = mask.flatten().nonzero().squeeze(1)
    student_hidden = hidden.flatten(0, 1).index_select(0, keep)
    teacher = signal.take(keep) if signal is not None else None
    wanted = targets.flatten().index_select(0, keep)

    def against(student_logits: Tensor, start: int, end: int) -> dict[str, LossTerm]:
        on = torch.ones_like(wanted[start:end], dtype=torch.bool)
        if isinstance(teacher, SparseSignal):
            few = teacher.part(start, end)
            terms = {name: few.loss(loss, student_logits, wanted[start:end], on) for name, loss in losses}
            for name, loss in losses:
                if loss.needs_teacher:  # nothing but this very KL can be taken from a sparse signal
                    return terms | {KL: terms[name].detach()}
            with torch.no_grad():
                return terms | {KL: sparse_forward_kl(student_logits, few, on)}
        with torch.no_grad():
            teacher_logits = teacher.head.logits(teacher.hidden[start:end]) if teacher is not None else None
        terms = {name: loss(student_logits, teacher_logits, wanted[start:end], on) for name, loss in losses}
        if teacher_logits is not None:
            with torch.no_grad():
                terms[KL] = forward_kl(student_logits, teacher_logits, on)
        return terms

    def chunk_terms(rows: Tensor, start: int, end: int) -> tuple[Tensor, dict[str, LossTerm]]:
        terms = against(head.logits(rows), start, end)
        total = torch.stack([number(loss.weight) * terms[name].sum for name, loss in losses]).sum()
        return total, terms

    names = [*(name for name, _ in losses), *([KL] if signal is not None else [])]
    learn = torch.is_grad_enabled()  # inside the Function it is always off
    out = _Chunked.apply(chunk_terms, names, chunk_tokens, learn, student_hidden, *head.parameters)
    count = torch.tensor(len(keep), device=hidden.device)
    return out[0], {name: LossTerm(value, count) for name, value in zip(names, out[1:], strict=True)}


class _Chunked(torch.autograd.Function):
    """Loss and gradient in the same pass; backward only scales what forward has kept."""

    @staticmethod
    def forward(
        ctx: Any, chunk_terms: Any, names: Any, chunk: int, learn: bool, hidden: Tensor, *parameters: Tensor
    ) -> Any:
        wanted = [learn and p.requires_grad for p in (hidden, *parameters)]
        sums = {name: hidden.new_zeros((), dtype=torch.float32) for name in names}
        total = hidden.new_zeros((), dtype=torch.float32)
        # fp32, because in bf16 a sum over many chunks loses the small ones
        grad_hidden, *grad_parameters = (
            torch.zeros_like(p, dtype=torch.float32) if on else None
            for p, on in zip((hidden, *parameters), wanted, strict=True)
        )
        for start in range(0, hidden.shape[0], chunk):
            end = min(start + chunk, hidden.shape[0])
            rows = hidden[start:end].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                loss, terms = chunk_terms(rows, start, end)
            for name in names:
                sums[name] += terms[name].sum.detach()
            total += loss.detach()
            leaves = [leaf for leaf, on in zip((rows, *parameters), wanted, strict=True) if on]
            if leaves:
                grads = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[start:end] = next(grads)
                for slot in grad_parameters:
                    if slot is not None and (grad := next(grads)) is not None:
                        slot += grad
        ctx.grads = (grad_hidden, *grad_parameters)
        ctx.dtypes = [p.dtype for p in (hidden, *parameters)]
        values = tuple(sums[name] for name in names)
        ctx.mark_non_differentiable(*values)
        return (total, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        return (None,) * 4 + tuple(None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in pairs)
