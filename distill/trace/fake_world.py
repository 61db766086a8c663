"""A world of several processes of which there is one: collectives that move nothing and are counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytorch_lightning.strategies.model_parallel as model_parallel
import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as data_parallel
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.core.world import ADDRESS, PORT, World
from distill.trace.counter import OperationCounter
from distill.training import ranks


class _Reducer:
    """DDP's reducer, without what reads the numbers of the gradients."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return (lambda: False) if name == "_rebuild_buckets" else getattr(self._reducer, name)


class _Silent:
    """DDP's logger."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _ddp(counter: OperationCounter) -> Callable[..., None]:
    """``DistributedDataParallel.__init__`` whose buckets are counted instead of reduced."""
    init = DistributedDataParallel.__init__

    def made(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

        def reduce(bucket: dist.GradBucket) -> Any:
            buffer = bucket.buffer()
            counter.collective("all_reduce", buffer.numel() * buffer.element_size())
            done: Any = torch.futures.Future()
            done.set_result(buffer)
            return done

        self.register_comm_hook(None, lambda _, bucket: reduce(bucket))
        self.reducer = _Reducer(self.reducer)  # type: ignore[assignment]
        self.logger = _Silent()  # type: ignore[assignment]

    return made


@contextmanager
def fake_world(world: World, counter: OperationCounter) -> Iterator[None]:
    """Within the block there is a process group of the world, of which this process is the first."""
    if world.size == 1:
        yield
        return
    with ExitStack() as stack:

        def replace(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        def outside(owner: Any, name: str) -> None:
            """Have a function compute with real tensors."""
            function = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                with unset_fake_temporarily():
                    return function(*args, **kwargs)

            replace(owner, name, call)

        place = {ADDRESS: "127.0.0.1", PORT: "1", "RANK": "0", "WORLD_SIZE": str(world.size)}
        stack.enter_context(mock.patch.dict(os.environ, place))
        with unset_fake_temporarily():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
        stack.callback(dist.destroy_process_group)
        alike: dict[Any, Callable[[Any], Any]] = {
            ranks.from_first: lambda value: value,
            ranks.from_each: lambda value: [value] * world.size,
            ranks.largest: lambda value: value,
        }
        ours = [module for name, module in sys.modules.items() if name.startswith("distill.")]
        for module in ours:  # each that has imported one of them by name
            for name, found in list(vars(module).items()):
                if callable(found) and getattr(found, "__hash__", None) and found in alike:
                    replace(module, name, alike[found])
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            replace(data_parallel, name, lambda *_, **__: None)
        replace(DistributedDataParallel, "_get_ddp_logging_data", lambda self: {})
        replace(DistributedDataParallel, "__init__", _ddp(counter))
        outside(device_mesh, "init_device_mesh")
        outside(model_parallel, "_setup_device_mesh")
        for name in (
            "__init__",
            "__getitem__",
            "get_coordinate",
            "_flatten",
            "__hash__",
            "__eq__",
            "size",
            "get_local_rank",
        ):
            if name in vars(device_mesh.DeviceMesh):
                outside(device_mesh.DeviceMesh, name)
        yield
