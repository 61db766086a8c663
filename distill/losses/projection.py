"""Logits from hidden states, and gradients back: by explicit matrix products if the head is a plain linear layer.

    logits = hidden W^T + bias,   d hidden = d logits W,   d W = sum over chunks of (d logits)^T hidden

How it works. ``forward`` writes the logits of a chunk of tokens to a buffer. The losses overwrite them with their
gradient. ``backward`` reads the gradient from the same buffer and adds the resulting gradients to accumulators. There
are two implementations:

    LinearProjection   for a plain ``nn.Linear``: the three products above
    CalledProjection   for any other head (LoRA, fake-quantized, soft-capped, with hooks, sharded or packed weights): it
                       calls the module, and autograd computes the gradients

Memory layout. Each head has one fp32 buffer [chunk, vocabulary], whatever its dtype, because the losses compute in
fp32. The logits of a bf16 head are copied to this buffer, and their gradient is rounded to bf16 once. The accumulators
are also fp32, because a sum over many chunks in bf16 loses small addends.

Why not autograd for all heads. For every chunk, autograd would allocate new logits and a new gradient of the head's
weight, which is as large as the head. The explicit products allocate no memory after the first chunk in fp32.

The trade-off. The explicit products are correct only if the head computes exactly ``linear(hidden, weight, bias)``.
:func:`is_plain` checks this: it excludes everything by which PyTorch lets a user change a module, such as hooks. In
case of doubt the head is called, which is always correct and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Logits = Callable[[Tensor], Tensor]
Sums = Sequence[Tensor | None]
"""fp32 accumulators of the gradients of the hidden states and of each parameter; None if a gradient is not needed."""


class LinearProjection:
    """A plain linear layer. The matrix products are computed in the dtype in which the layer would compute.

    Args:
        layer: layer with a weight [vocabulary, hidden] and an optional bias.
        dtype: dtype of the matrix products.
        chunk_tokens: number of tokens for which the buffer has room.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, chunk_tokens: int):
        self.weight = layer.weight.detach().to(dtype)  # [vocabulary, hidden]
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)  # [vocabulary]
        self.buffer = self.weight.new_empty(chunk_tokens, len(self.weight), dtype=torch.float32)  # [chunk, vocabulary]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in fp32, [tokens, hidden] -> [tokens, vocabulary]. The next call overwrites them."""
        out = self.buffer[: len(hidden)]  # [tokens, vocabulary]
        if self.weight.dtype != out.dtype:
            return out.copy_(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def backward(self, hidden: Tensor, gradient: Tensor, sums: Sums) -> None:
        """Add the gradients of the hidden states and parameters to ``sums``. The other tensors are only read.

        Args:
            hidden: input of the last ``forward``, [tokens, hidden].
            gradient: gradient with respect to the logits, fp32 [tokens, vocabulary].
            sums: accumulators for the hidden states [tokens, hidden], the weight [vocabulary, hidden] and the bias
                [vocabulary].
        """
        of_hidden, of_weight, of_bias = (*sums, None, None)[:3]
        if of_bias is not None:
            of_bias += gradient.sum(0)
        hidden, gradient = hidden.to(self.weight.dtype), gradient.to(self.weight.dtype)
        if of_hidden is not None:
            _add_product(of_hidden, gradient, self.weight)  # [tokens, vocabulary] @ [vocabulary, hidden]
        if of_weight is not None:
            _add_product(of_weight, gradient.T, hidden)  # [vocabulary, tokens] @ [tokens, hidden]


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right``, without a temporary tensor if the dtypes are equal."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


class CalledProjection:
    """Any other head; the module is called.

    Args:
        logits: function [tokens, hidden] -> [tokens, vocabulary].
        parameters: parameters of the head that are trained.
        chunk_tokens: number of tokens for which the buffer has room.
        learn: whether ``backward`` will be called.
    """

    def __init__(self, logits: Logits, parameters: Sequence[Tensor], chunk_tokens: int, learn: bool):
        self.logits, self.parameters, self.chunk_tokens, self.learn = logits, parameters, chunk_tokens, learn
        self.buffer: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in fp32, [tokens, hidden] -> [tokens, vocabulary]. The next call overwrites them."""
        self.hidden = hidden.detach().requires_grad_(self.learn)  # [tokens, hidden], the leaf of the chunk's graph
        with torch.set_grad_enabled(self.learn):
            self.out = self.logits(self.hidden)  # [tokens, vocabulary], in the head's own dtype
        if self.buffer is None:
            self.buffer = self.out.new_empty(self.chunk_tokens, self.out.shape[-1], dtype=torch.float32)
        # copied, because the head's own backward pass may need its output
        return self.buffer[: len(hidden)].copy_(self.out)

    def backward(self, hidden: Tensor, gradient: Tensor, sums: Sums) -> None:
        """See :meth:`LinearProjection.backward`; ``sums`` is for the hidden states and each parameter."""
        wanted = [
            (leaf, into) for leaf, into in zip((self.hidden, *self.parameters), sums, strict=True) if into is not None
        ]
        leaves = [leaf for leaf, _ in wanted]
        found = torch.autograd.grad(self.out, leaves, gradient.to(self.out.dtype), allow_unused=True)
        for (_, into), grad in zip(wanted, found, strict=True):
            if grad is not None:
                into += grad


def projection(
    logits: Logits, parameters: Sequence[Tensor], hidden: Tensor, chunk_tokens: int, learn: bool
) -> LinearProjection | CalledProjection:
    """The fastest implementation that is correct for this head and the dtype of these hidden states."""
    if is_plain(logits, hidden) and all(p is own for p, own in zip(parameters, logits.parameters(), strict=False)):
        return LinearProjection(logits, product_dtype(logits), chunk_tokens)
    return CalledProjection(logits, parameters, chunk_tokens, learn)


def is_plain(head: Logits, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``head`` computes just ``linear(hidden, weight, bias)``: no subclass, hooks or packed weights."""
    if type(head) is not nn.Linear or "forward" in vars(head) or torch_module._has_any_global_hook():
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    tensors = all(type(p) in (nn.Parameter, Tensor) for p in (head.weight, head.bias) if p is not None)
    same_dtype = head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
    return tensors and same_dtype and not any(hooks)


def product_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype in which ``layer`` computes here: that of autocast if it is enabled, else that of its weight."""
    device = layer.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
