"""Sends a model, part by part, from rank 0, which has loaded it, to the other ranks, which have only its shapes.

So a machine with many GPUs reads a model once and holds it once in CPU memory, and each process holds only its shards
and one part. The tensors of rank 0 are sent unchanged, whether they were loaded, converted, rounded or randomly
initialised, so the other ranks need not know how they were made. Buffers that are in no file are sent too.
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
    """Whether any process has only the shapes of a model. This is a collective call."""
    return bool(largest(any(tensor.is_meta for _, tensor in _tensors(model))))


def send(part: nn.Module, device: torch.device) -> None:
    """Broadcast the parameters and buffers of rank 0 to all ranks, in place. Tensors that are already sharded stay.

    Args:
        part: module with the same architecture in every process.
        device: device on which the tensors are sent and received.

    Raises:
        DistillError: a process has built a different module than rank 0; all processes raise it.
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
    """Parameters and buffers by name, without duplicates and without tensors that are already sharded."""
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if not isinstance(tensor, DTensor):
            yield name, tensor


def _broadcast(tensor: Tensor) -> Tensor:
    """Broadcast a tensor as bytes, because not every backend supports every dtype."""
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
    return tensor


def _take(ours: Tensor, value: Tensor) -> None:
    """Set the value of a tensor in place, so that all references to it stay valid (a tied weight, an adapter)."""
    if ours.is_meta:
        new = nn.Parameter(value, requires_grad=ours.requires_grad) if isinstance(ours, nn.Parameter) else value
        torch.utils.swap_tensors(ours, new)
    else:
        ours.detach().copy_(value)
