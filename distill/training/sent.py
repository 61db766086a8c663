"""A model that the first process has read, sent to others that have built only its shapes, a part at a time.

So a machine of many GPUs reads a model once and holds it once, and each process no more than its shares and one part.
What is sent is whatever the first one has, to the last bit - read, converted, rounded, drawn by chance -, so nobody
else need know how it came about; buffers that no file holds are sent as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.core.errors import DistillError
from distill.training.ranks import from_first, largest


def is_to_be_sent(model: nn.Module) -> bool:
    """Whether any process has only the shapes of a model; all must ask."""
    return bool(largest(any(tensor.is_meta for _, tensor in _tensors(model))))


def send(part: nn.Module, device: torch.device) -> None:
    """Give all processes the first one's parameters and buffers, in place; those that are shared out stay as they are.

    Args:
        part: of the same build in every process.
        device: where they arrive, and the first process sends from.

    Raises:
        DistillError: one has built another one than the first; all raise it.
    """
    ours = dict(_tensors(part))
    sent = from_first({name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()})
    shapes = {name: shape for name, (shape, _) in sent.items()}
    if largest({name: tensor.shape for name, tensor in ours.items()} != shapes):
        name = type(part).__name__
        raise DistillError(f"{name}: the processes have built different models; have all of them the same versions?")
    for name, (shape, dtype) in sent.items():
        if dist.get_rank() == 0:
            _broadcast(ours[name].detach().to(device).contiguous())
        else:
            _take(ours[name], _broadcast(torch.empty(shape, dtype=dtype, device=device)))


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once; of blocks that are shared out already, none."""
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if not isinstance(tensor, DTensor):
            yield name, tensor


def _broadcast(tensor: Tensor) -> Tensor:
    """As bytes: not every backend knows every type."""
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
    return tensor


def _take(ours: Tensor, value: Tensor) -> None:
    """Put a value where a tensor is, which stays the same object to all that hold it (a tied weight, an adapter)."""
    if ours.is_meta:
        new = nn.Parameter(value, requires_grad=ours.requires_grad) if isinstance(ours, nn.Parameter) else value
        torch.utils.swap_tensors(ours, new)
    else:
        ours.detach().copy_(value)
