"""Hidden states times an output head, and back: by explicit products where the head is one plain linear layer.

    logits = hidden W^T + bias,   d hidden = d logits W,   d W = sum over chunks of (d logits)^T hidden

Written out, the logits of every chunk go into the same buffer, their gradient is taken from where it was written, and
the head's is summed where it stays. Any other head (LoRA, fake-quant, soft-caps, hooks, sharded or packed weights) is
called as the module it is, and autograd takes the gradient of its logits on through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Logits = Callable[[Tensor], Tensor]
Sums = Sequence[Tensor | None]
"""fp32 accumulators of the gradients of the hidden states and of each of the head's parameters; None where unwanted."""


class LinearProjection:
    """A plain linear layer; products in the dtype that it would have computed in.

    Args:
        layer: weight [vocabulary, hidden], bias or none.
        dtype: of the products.
        chunk_tokens: rows of the buffer.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, chunk_tokens: int):
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.buffer = self.weight.new_empty(chunk_tokens, len(self.weight), dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in fp32, [tokens, hidden] -> [tokens, vocabulary]; the next call overwrites them."""
        out = self.buffer[: len(hidden)]
        if self.weight.dtype != out.dtype:
            return out.copy_(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def backward(self, hidden: Tensor, gradient: Tensor, sums: Sums) -> None:
        """Add to ``sums`` what the logits' gradient [tokens, vocabulary] makes of it."""
        of_hidden, of_weight, of_bias = (*sums, None, None)[:3]
        if of_bias is not None:
            of_bias += gradient.sum(0)
        hidden, gradient = hidden.to(self.weight.dtype), gradient.to(self.weight.dtype)
        if of_hidden is not None:
            _add_product(of_hidden, gradient, self.weight)
        if of_weight is not None:
            _add_product(of_weight, gradient.T, hidden)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


class CalledProjection:
    """Any head, called as it is.

    Args:
        logits: [tokens, hidden] -> [tokens, vocabulary].
        parameters: what of it is trained.
        chunk_tokens: rows of the buffer.
        learn: whether ``backward`` will be called.
    """

    def __init__(self, logits: Logits, parameters: Sequence[Tensor], chunk_tokens: int, learn: bool):
        self.logits, self.parameters, self.chunk_tokens, self.learn = logits, parameters, chunk_tokens, learn
        self.buffer: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in fp32, [tokens, hidden] -> [tokens, vocabulary]; the next call overwrites them."""
        self.rows = hidden.detach().requires_grad_(self.learn)
        with torch.set_grad_enabled(self.learn):
            self.out = self.logits(self.rows)
        if self.buffer is None:
            self.buffer = self.out.new_empty(self.chunk_tokens, self.out.shape[-1], dtype=torch.float32)
        # a copy, as the head may need what it returned for its own gradient
        return self.buffer[: len(hidden)].copy_(self.out)

    def backward(self, hidden: Tensor, gradient: Tensor, sums: Sums) -> None:
        """Add to ``sums`` what the logits' gradient [tokens, vocabulary] makes of it."""
        wanted = [
            (leaf, into) for leaf, into in zip((self.rows, *self.parameters), sums, strict=True) if into is not None
        ]
        leaves = [leaf for leaf, _ in wanted]
        found = torch.autograd.grad(self.out, leaves, gradient.to(self.out.dtype), allow_unused=True)
        for (_, into), grad in zip(wanted, found, strict=True):
            if grad is not None:
                into += grad


def projection(
    logits: Logits, parameters: Sequence[Tensor], hidden: Tensor, chunk_tokens: int, learn: bool
) -> LinearProjection | CalledProjection:
    """The faster of the two that is right for this head and these hidden states."""
    if is_plain(logits, hidden) and all(p is own for p, own in zip(parameters, logits.parameters(), strict=False)):
        return LinearProjection(logits, product_dtype(logits), chunk_tokens)
    return CalledProjection(logits, parameters, chunk_tokens, learn)


def is_plain(head: Logits, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """Whether calling ``head`` is no more than ``linear(hidden, weight, bias)``: no subclass, hook or packed weight."""
    if type(head) is not nn.Linear or "forward" in vars(head) or torch_module._has_any_global_hook():
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    tensors = all(type(p) in (nn.Parameter, Tensor) for p in (head.weight, head.bias) if p is not None)
    same_dtype = head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
    return tensors and same_dtype and not any(hooks)


def product_dtype(layer: nn.Linear) -> torch.dtype:
    """What ``layer`` computes in here: its own dtype, or that of autocast."""
    device = layer.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
