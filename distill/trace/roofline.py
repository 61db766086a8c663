"""How long a GPU needs for traced operations at least: each at the slower of its arithmetic and its memory.

    time of a kernel     = max(FLOPs / FLOP/s, bytes / bandwidth)               roofline, Williams et al. 2009
    time of a collective = bytes (N - 1) / N / bandwidth of the links, twice that where gradients are all-reduced
    step                 = max(sum of kernels, sum of collectives)              as if these ran wholly beside those

A real step is slower: kernels have gaps between them, and collectives that are waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from distill.core.world import World
from distill.trace.figures import Figures, Work
from distill.trace.gpus import NETWORK_BANDWIDTH, REACHED_BANDWIDTH, REACHED_FLOPS, Gpu


@dataclass(frozen=True)
class Part:
    """Operations of a step together.

    Attributes:
        kernels: how many.
        num_bytes: read and written.
        flops: of their products.
        seconds: that they take at least.
        of_products: share of the seconds in operations that multiply matrices, attention among them.
    """

    kernels: int
    num_bytes: int
    flops: int
    seconds: float
    of_products: float


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step of a stage.

    Attributes:
        kernel_seconds: of all micro-batches and what comes once.
        collective_seconds: the same.
        tokens: of all processes.
        mfu: model FLOPs per second and GPU as a share of its peak; no run can exceed it.
    """

    kernel_seconds: float
    collective_seconds: float
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        """That the step takes at least."""
        return max(self.kernel_seconds, self.collective_seconds)


def part(works: Iterable[Work], gpu: Gpu) -> Part:
    """Sums over the kernels among some operations."""
    kernels = num_bytes = flops = 0
    seconds = products = 0.0
    for work in works:
        if work.kind == "kernel":
            flops_per_s = gpu.half_flops if work.is_half else gpu.single_flops
            of_memory = work.num_bytes / (gpu.bandwidth * REACHED_BANDWIDTH)
            each = work.count * max(work.flops / (flops_per_s * REACHED_FLOPS), of_memory)
            kernels += work.count
            num_bytes += work.count * work.num_bytes
            flops += work.count * work.flops
            seconds += each
            products += each * (work.flops > 0)
    return Part(kernels, num_bytes, flops, seconds, products / seconds if seconds else 0.0)


def collective_seconds(works: Iterable[Work], gpu: Gpu, world: World) -> float:
    """Of the collectives among some operations, over all processes of a world."""
    if world.size == 1:
        return 0.0
    links = gpu.link_bandwidth
    if world.num_nodes > 1:  # each GPU has a network card, and the rings of a machine use all of them
        links = min(links, world.local_size * NETWORK_BANDWIDTH)
    share = (world.size - 1) / world.size / (links * REACHED_BANDWIDTH)
    passes = {"all_reduce": 2}
    return sum(w.count * w.num_bytes * share * passes.get(w.name, 1) for w in works if w.kind == "collective")


def step_time(figures: Figures, gpu: Gpu, world: World, num_micro_batches: int) -> StepTime:
    """The step of so many micro-batches, of which some were traced.

    Args:
        figures: of the trace.
        gpu: that runs it.
        world: the processes that train together.
        num_micro_batches: of a step of the recipe.
    """
    works = list(repeated(figures, num_micro_batches))
    kernels, collectives = part(works, gpu).seconds, collective_seconds(works, gpu, world)
    tokens = figures.tokens * num_micro_batches
    seconds = max(kernels, collectives)
    return StepTime(kernels, collectives, tokens * world.size, tokens * figures.model_flops / seconds / gpu.half_flops)


def repeated(figures: Figures, num_micro_batches: int) -> Iterator[Work]:
    """The operations of a step of so many micro-batches; those that were not traced are as the first."""
    last = figures.num_micro_batches - 1
    for work in figures.works:
        if work.micro_batch == last:
            yield work
        else:
            yield replace(work, count=work.count * (num_micro_batches - 1) // last)
