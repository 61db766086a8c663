"""A CUDA that answers as a node of GPUs does and computes nothing: tensors have devices and shapes, and no memory.

Everything here replaces an interface of torch or transformers for as long as the block lasts, in a process that does
nothing else. What a fake cannot do has a double:

    torch.cuda.*                  streams and events that do nothing, one GPU's name and memory
    scaled_dot_product_attention  the kernel that a GPU of compute capability 8.0 or more takes: flash attention without
                                  a mask, memory-efficient attention with one (a CPU build would take the plain one)
    Module._apply                 replaces parameters; ``swap_tensors`` refuses a fake tensor that something refers to
    packed rows                   whether position ids restart is asked of their numbers; here it is known
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import masking_utils

from distill.losses import projection
from distill.trace.counter import OperationCounter

NUM_GPUS = 8
MEMORY_BYTES = 141 * 10**9


class FakeStream:
    """A stream of nothing."""

    stream_id = 0

    def __init__(self, *_: Any, **__: Any):
        self.device = torch.device("cuda", 0)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any): ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, event: Any) -> float:
        return 0.0


class Mode(FakeTensorMode):
    """Never asks a device for anything, also while ``torch.cuda`` says that there is one."""

    avoid_device_init = True


def _cuda(counter: OperationCounter) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""
    stream = FakeStream()
    properties = types.SimpleNamespace(
        name="NVIDIA H200", total_memory=MEMORY_BYTES, major=9, minor=0, multi_processor_count=132
    )

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    return {
        "is_available": always(True), "is_initialized": always(True), "device_count": always(NUM_GPUS),
        "current_device": always(0), "get_device_capability": always((9, 0)), "is_bf16_supported": always(True),
        "get_device_name": always(properties.name), "get_device_properties": always(properties),
        "Stream": FakeStream, "Event": Event, "current_stream": always(stream), "default_stream": always(stream),
        "stream": lambda _: nullcontext(), "device": lambda _: nullcontext(), 
        "is_current_stream_capturing": always(False),
        "synchronize": lambda *_: counter.wait("all of it"), "memory_allocated": lambda *_: counter.now,
        "max_memory_allocated": lambda *_: counter.peak, "memory_stats": always({}),
        "max_memory_reserved": lambda *_: counter.peak, "mem_get_info": always((MEMORY_BYTES, MEMORY_BYTES)),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(
            ("set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "set_rng_state",
             "_lazy_init"),
            always(None),
        ),
    }  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as a GPU dispatches it (sdp_utils.cpp): [batch, heads, tokens, size].

    Flash attention takes 16-bit numbers and no mask, and serves several query heads per key; the memory-efficient
    kernel takes a mask in place of all that, for which keys and values are repeated for each query head.
    """
    if torch.is_autocast_enabled("cuda"):  # attention is on autocast's list of operations in half precision
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    repeats = query.shape[1] // key.shape[1]
    if enable_gqa and repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            empty = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = empty.masked_fill_(attn_mask.logical_not(), float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:2], -1, -1)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


def _replacing_apply() -> Callable[..., nn.Module]:
    """``Module._apply`` that makes new parameters; those that are tied stay tied."""
    moved: dict[tuple[Any, ...], tuple[Tensor, nn.Parameter]] = {}  # with the old one, so that its id stays its own

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children():
            child._apply(function)
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                new = function(parameter)
            if new is not parameter and (new.device, new.dtype) != (parameter.device, parameter.dtype):
                key = (id(parameter), new.device, new.dtype)
                moved.setdefault(key, (parameter, nn.Parameter(new, parameter.requires_grad)))
                self._parameters[name] = moved[key][1]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = function(buffer)
        return self

    return apply


@contextmanager
def fake_cuda(*, has_documents: bool = False) -> Iterator[OperationCounter]:
    """Within the block tensors are fake, and ``torch.cuda`` is a node of GPUs.

    Args:
        has_documents: whether the rows of the batches hold several documents apart.

    Yields:
        What counts the operations.
    """
    counter = OperationCounter()
    resize, packed = torch.UntypedStorage.resize_, masking_utils.find_packed_sequence_indices

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize(storage, size)
        counter.resized(storage)
        return out

    def find_packed(position_ids: Tensor) -> Tensor | None:
        counter.wait("whether position ids restart", position_ids.device.type == "cuda")
        return packed(position_ids) if has_documents else None

    def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.paused():
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:

        def replace(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        for name, answer in _cuda(counter).items():
            replace(torch.cuda, name, answer)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(torch.UntypedStorage, "resize_", resized)
        replace(torch.Tensor, "record_stream", lambda *_: None)
        replace(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
        replace(F, "scaled_dot_product_attention", attention)
        replace(nn.Module, "_apply", _replacing_apply())
        replace(masking_utils, "is_tracing", lambda *_: False)
        replace(masking_utils, "find_packed_sequence_indices", find_packed)
        replace(projection, "Tensor", FakeTensor)  # the class of a plain weight, by which a plain head is told
        for name in [name for name in vars(ShardingPropagator) if name.startswith("_propagate_tensor_meta")]:
            if callable(found := vars(ShardingPropagator)[name]):
                replace(ShardingPropagator, name, quiet(found))
        stack.enter_context(Mode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        yield counter
