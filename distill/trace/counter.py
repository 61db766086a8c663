"""Every operation on a fake GPU: bytes that are alive, waits of the CPU, traffic and arithmetic."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from distill.trace.figures import Wait, Work

ALIGNMENT = 512
"""Bytes to which PyTorch's allocator rounds up."""
HALF = (torch.bfloat16, torch.float16)
FREE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}
"""Operations that launch no kernel."""
OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}
"""Operations in place that do not read what they write."""
PICK = {"embedding", "index_select", "gather", "index"}
"""Operations that read only those elements of their input that they return."""
COLLECTIVES = {
    "_allgather_base_": "all_gather", "allgather_": "all_gather", "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter", "allreduce_": "all_reduce",
    "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "broadcast_": "broadcast",
}  # fmt: skip
PACKAGE = Path(__file__).parents[1]
aten = torch.ops.aten


class OperationCounter(TorchDispatchMode):
    """Sees each operation below autograd; must be entered after the fake tensor mode.

    Attributes:
        now: bytes of tensors on the GPU that are alive.
        peak: the most since :meth:`forget_peak`.
        peak_phase: in which it was.
        peaks: of each phase.
        host: bytes of tensors in the host's memory that were made since.
        host_peak: the most of them.
        phase: what is running.
        micro_batch: of the step, that is running.
        is_recording: whether operations and waits are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.host = self.host_peak = 0
        self.phase, self.peak_phase = "setup", "setup"
        self.peaks: Counter[str] = Counter()
        self.is_recording = self.is_paused = False
        self.micro_batch = 0
        self._sizes: dict[int, int] = {}
        self._host_sizes: dict[int, int] = {}
        self._works: Counter[Work] = Counter()
        self._waits: Counter[tuple[str, str, str]] = Counter()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Give what runs within the block a name."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within the block: DTensor finds shapes by running operations on fake tensors of its own."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def forget_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak = 0
        self.peaks.clear()

    def works(self) -> list[Work]:
        """The operations so far."""
        return [replace(work, count=count) for work, count in self._works.items()]

    def waits(self) -> list[Wait]:
        """The waits so far."""
        return [Wait(*key, count) for key, count in self._waits.items()]

    # memory

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it dies."""
        if tensor.device.type == "cuda" and tensor.device.index in (None, 0):
            self._add(tensor.untyped_storage(), self._sizes)
        elif tensor.device.type == "cpu":
            self._add(tensor.untyped_storage(), self._host_sizes)

    def _add(self, storage: torch.UntypedStorage, sizes: dict[int, int]) -> None:
        key = storage._cdata
        if key not in sizes:
            sizes[key] = 0
            weakref.finalize(storage, self._drop, key, sizes)
        self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Look at the size of a storage again, if it is one that is counted."""
        key = storage._cdata
        for sizes in (self._sizes, self._host_sizes):
            if key in sizes:
                self._change(key, -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT, sizes)

    def _drop(self, key: int, sizes: dict[int, int]) -> None:
        self._change(key, 0, sizes)
        sizes.pop(key, None)

    def _change(self, key: int, size: int, sizes: dict[int, int]) -> None:
        more, sizes[key] = size - sizes.get(key, 0), size
        if sizes is self._host_sizes:
            self.host += more
            self.host_peak = max(self.host_peak, self.host)
            return
        self.now += more
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        if self.now > self.peak:
            self.peak, self.peak_phase = self.now, self.phase

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what device a tensor is on
            return func(*args, **kwargs)
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it becomes operations on shards, which come here again
        if self.is_paused:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
        known, answer = self._answer(func, inputs, on_gpu)
        if known:
            return answer
        if (copied := _blocking_copy(func, args, kwargs)) is not None:
            self.wait(copied)
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self.add(tensor)
        if self.is_recording and (on_gpu or any(tensor.device.type == "cuda" for tensor in outputs)):
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _answer(self, func: Any, inputs: list[Tensor], on_gpu: bool) -> tuple[bool, Any]:
        """(whether it asks for a number, which a fake tensor has not; the number to go on with)."""
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return False, None
        first: Any = inputs[0]
        if func is aten._local_scalar_dense.default and first.constant is None:
            self.wait("a number", on_gpu)
            return True, False if first.dtype == torch.bool else 0.0 if first.dtype.is_floating_point else 1
        if func in (aten.equal.default, aten.is_nonzero.default):
            self.wait("a comparison", on_gpu)
            return True, False
        if func is aten.nonzero.default:
            self.wait("the number of positions", on_gpu)
            found = torch.empty(first.numel(), first.ndim, dtype=torch.int64, device=first.device)
            self.add(found)
            return True, found
        return False, None

    def wait(self, what: str, on_gpu: bool = True) -> None:
        """Count a wait of the CPU for the GPU, with the place in the code that asks for it."""
        if on_gpu and self.is_recording:
            self._waits[self.phase, what, _place()] += 1

    def collective(self, name: str, num_bytes: int) -> None:
        """Count a collective."""
        if self.is_recording:
            self._works[Work(self.micro_batch, self.phase, name, "collective", num_bytes, 0, False, 1)] += 1

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            if name in COLLECTIVES:
                self.collective(COLLECTIVES[name], max(_size(tensor) for tensor in [*inputs, *outputs]))
            return
        if space != "aten" or func.is_view or name in FREE:
            return
        flops = _flops(func, name, args, kwargs, out)
        # by the first operand: the backward pass of attention in bf16 reads sums of exponentials in fp32 as well
        is_half = next((tensor.dtype in HALF for tensor in inputs if tensor.is_floating_point()), False)
        moved = _moved(func, name, args, kwargs, outputs)
        self._works[Work(self.micro_batch, self.phase, name, "kernel", moved, flops, is_half, 1)] += 1


def _blocking_copy(func: Any, args: Any, kwargs: Any) -> str | None:
    """What a copy between host and GPU waits for; None where it is none, or was asked not to wait."""
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        source, target, waits = args[0].device.type, torch.device(kwargs["device"]).type, not kwargs.get("non_blocking")
    elif func is aten.copy_.default:
        source, target, waits = args[1].device.type, args[0].device.type, not (len(args) > 2 and args[2])
    else:
        return None
    if not waits or {source, target} != {"cpu", "cuda"}:
        return None
    return "a copy to the host" if target == "cpu" else "a copy to the GPU"


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; an expanded one has those of its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes() or sys.maxsize)


def _moved(func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes on the GPU; the schema says which arguments it writes."""
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {id(leaf): leaf for leaf in leaves}
            if argument.kwarg_only or name in OVERWRITE:
                continue
        read |= {id(leaf): leaf for leaf in leaves}
    made = {id(leaf): leaf for leaf in outputs if leaf.device.type == "cuda"}
    written |= made
    if name in PICK:
        return 2 * sum(map(_size, made.values()))
    return sum(map(_size, read.values())) + sum(map(_size, written.values()))


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if name == "linear":
        return 2 * int(out.numel()) * int(args[1].shape[-1])
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    flops = int(formula(*args, **kwargs, out_val=out))
    is_causal = "attention" in name and any(value is True for value in args)
    return flops // 2 if is_causal else flops


def _place() -> str:
    """The innermost line that is running of this package or of transformers."""
    for frame in reversed(traceback.extract_stack()[:-3]):
        path = Path(frame.filename)
        if "transformers" in path.parts or (PACKAGE in path.parents and path.parent != Path(__file__).parent):
            break
    return f"{'/'.join(path.parts[-2:])}:{frame.lineno}"
