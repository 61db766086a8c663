"""Traces in words: what ``distill check --trace`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from distill.forecast.memory_limit import amount
from distill.recipe import Recipe
from distill.trace.figures import MICRO_PHASES, Figures
from distill.trace.gpus import GPUS, REACHED_BANDWIDTH, REACHED_FLOPS, Gpu, gpu_named
from distill.trace.jobs import Job, jobs_of
from distill.trace.roofline import part, repeated, step_time
from distill.trace.trace_process import Tracer

LIBRARIES_BYTES = 2e9
"""On a GPU beside the tensors: its context, the workspace of cuBLAS, buffers of NCCL, and fragments."""


def describe_traces(recipe: Recipe, gpu: str | None, devices: int | None, num_nodes: int | None) -> Iterator[str]:
    """The lines of all training stages of a recipe; what is wrong with the arguments is said at once.

    Args:
        recipe: that ``distill check`` accepts.
        gpu: name of the GPU that times are for; None: all that are known.
        devices: of a machine; None: those of the recipe.
        num_nodes: machines; None: those of the recipe.

    Raises:
        InputError: no such GPU, or a batch does not split.
        MachineError: this machine cannot trace.
    """
    gpus = [gpu_named(gpu)] if gpu is not None else list(GPUS.values())
    found = list(jobs_of(recipe, devices, num_nodes))
    jobs = [job for job in found if isinstance(job, Job)]
    return _lines_of(found, jobs, gpus)


def _lines_of(found: list[Job | str], jobs: list[Job], gpus: list[Gpu]) -> Iterator[str]:
    yield from (f"  {line}" for line in found if isinstance(line, str))
    if not jobs:
        yield "  no training stage to trace"
        return
    yield (
        f"traced on fake GPUs: least times at {REACHED_FLOPS:.0%} of a GPU's FLOP/s and {REACHED_BANDWIDTH:.0%} of its "
        "bandwidth, without gaps"
    )
    with Tracer() as tracer:
        for job in jobs:
            yield from lines(job, tracer.trace(job), gpus)


def lines(job: Job, figures: Figures, gpus: list[Gpu]) -> Iterator[str]:
    """One training stage."""
    world, memory = job.world, job.memory
    many = f"{world.size} GPUs ({'fsdp' if memory.sharded else 'ddp'}), " if world.size > 1 else ""
    yield (
        f"{job.name}: {many}{job.num_micro_batches} micro-batches of {memory.micro_batch_size} x "
        f"{memory.sequence_length:,} tokens per step and GPU, {memory.precision}"
    )
    forecast = memory.memory().total
    yield (
        f"  peak {amount(figures.peak_bytes)} in {figures.peak_phase} (forecast {amount(forecast)}); before the first "
        f"step {amount(figures.still_bytes)}"
    )
    yield "  peak by phase: " + ", ".join(f"{phase} {amount(peak)}" for phase, peak in _in_order(figures.peaks))
    works = list(repeated(figures, job.num_micro_batches))
    whole = part(works, gpus[0])
    yield (
        f"  a step: {whole.kernels:,} kernels, {whole.num_bytes / 1e9:,.1f} GB moved, {whole.flops / 1e12:,.2f} TFLOP"
    )
    if collectives := [work for work in works if work.kind == "collective"]:
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for work in collectives:
            counts[work.name] += work.count
            sizes[work.name] += work.count * work.num_bytes
        each = (f"{count:,} {name} of {amount(sizes[name])}" for name, count in counts.items())
        yield "  collectives of a step: " + ", ".join(each)
    yield f"  the CPU waits for the GPU {figures.waits_per_micro_batch():g} times per micro-batch"
    for wait in figures.waits:
        yield f"    {wait.place} in {wait.phase}: asks for {wait.what}, {wait.count} x"
    for gpu in gpus:
        time = step_time(figures, gpu, world, job.num_micro_batches)
        beside = f", collectives {_ms(time.collective_seconds)} beside them" if world.size > 1 else ""
        room = gpu.memory_bytes - LIBRARIES_BYTES - figures.peak_bytes
        fits = f"{amount(room)} free" if room >= 0 else f"does not fit, {amount(-room)} too much"
        yield (
            f"  {gpu.name}: at least {_ms(time.seconds)} per step ({_ms(time.kernel_seconds)} kernels{beside}), at "
            f"most {time.tokens / time.seconds:,.0f} tokens/s, MFU at most {time.mfu:.2f}; {fits} of "
            f"{amount(gpu.memory_bytes)}"
        )


def _in_order(peaks: object) -> list[tuple[str, int]]:
    """Phases in the order of a step."""
    assert isinstance(peaks, dict)
    order = (*MICRO_PHASES, "step", "scale and clip", "optimizer")
    return [(phase, peaks[phase]) for phase in order if phase in peaks]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
