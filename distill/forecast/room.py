"""Whether a training stage fits into the memory that is there, and what to change when it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import get_args

from distill.forecast.memory import Job, Precision
from distill.forecast.models import Config, Known, count, known_or_found
from distill.losses import ForwardKL
from distill.recipe import Recipe
from distill.stages.base import SELF, StageSpec
from distill.stages.cache_teacher import CacheTeacher
from distill.stages.prune import Prune
from distill.stages.quantize import Quantize
from distill.training.spec import BudgetSpec, ComputeSpec, DistillSpec, split_batch

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Room:
    """Where the processes of a run are to live.

    Attributes:
        on_gpu: whether that is a GPU.
        num_bytes: of memory for one process; None when nobody knows.
        num_gpus: of this machine; None when nobody knows.
    """

    on_gpu: bool
    num_bytes: float | None
    num_gpus: int | None = None

    @classmethod
    def of(cls, compute: ComputeSpec, memory_gb: float | None = None) -> Room:
        """What was said, or else what this machine has; ``auto`` is a GPU where there is one."""
        if memory_gb is not None:
            return cls(compute.accelerator != "cpu", memory_gb * 1e9)
        gpus = _gpus() if compute.accelerator != "cpu" else []
        if gpus or compute.accelerator == "gpu":
            return cls(True, min(gpus, default=None), len(gpus) or None)
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(False, here / (1 if compute.devices == "auto" else compute.devices))

    def processes(self, compute: ComputeSpec) -> int:
        """That train together; ``devices: auto`` is all GPUs of a machine, or one where nobody knows."""
        if self.on_gpu and compute.devices == "auto":
            return compute.num_nodes * (self.num_gpus or 1)
        return compute.known_processes()


def _gpus() -> list[float]:
    """Bytes of the GPUs that the driver's own tool shows; no torch is needed to ask it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return [int(mib) * 2.0**20 for mib in shown]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def training_of(stage: StageSpec) -> BudgetSpec | None:
    """How a stage trains, a search its candidates; None when it does not."""
    if isinstance(stage, Prune):
        return stage.search.train if stage.search is not None else None
    return stage if isinstance(stage, BudgetSpec) else None


def job_of(name: str, stage: StageSpec, recipe: Recipe, known: Known, room: Room) -> Job | None:
    """What a stage trains, and how; None when it does not train or its student is not known."""
    length, compute = recipe.data.sequence_length, recipe.compute
    student, budget = known[name], training_of(stage)
    if budget is None or not budget.steps(length) or student is None or count(student) is None:
        return None
    is_search = isinstance(stage, Prune)
    num_processes = 1 if is_search else room.processes(compute)
    micro, num_micro = split_batch(budget, compute, num_processes)
    teacher, is_cached, lacks_teacher = _teacher(stage, recipe, known)
    losses = stage.losses if isinstance(stage, DistillSpec) else [ForwardKL()] if is_search else []
    automatic: Precision = "bf16-mixed" if room.on_gpu else "32-true"
    return Job(
        student=student,
        teacher=teacher,
        teacher_bytes=_teacher_bytes(teacher, compute, room),
        is_cached=is_cached,
        head_only=is_cached or (room.on_gpu and compute.teacher_device not in ("auto", "cuda", "cuda:0")),
        lora=getattr(stage, "lora", None),
        quantized=isinstance(stage, Quantize),
        lone_forward_kl=losses == [ForwardKL()],
        precision=next((p for p in get_args(Precision) if p == compute.precision), automatic),
        micro_batch_size=micro,
        accumulates=num_micro > 1,
        sequence_length=length,
        checkpointing=compute.gradient_checkpointing,
        on_cpu=not room.on_gpu,
        num_processes=num_processes,
        sharded=compute.strategy == "fsdp" and not is_search,
        alone=is_search,
        lacks_teacher=lacks_teacher,
        writes_behind=compute.write_checkpoints == "behind",
    )


def _teacher(stage: StageSpec, recipe: Recipe, known: Known) -> tuple[Config | None, bool, bool]:
    """The config of the teacher that a stage has in memory, if any; whether it is the head alone; of unknown size."""
    role = "model" if isinstance(stage, Prune) else "teacher"  # the candidates of a search learn from what is cut
    reference = next((reference for key, reference in stage.references() if key == (role,)), SELF)
    if reference == SELF:
        return None, False, False
    cache = recipe.stages.get(reference)
    is_cache = isinstance(cache, CacheTeacher)
    if isinstance(cache, CacheTeacher):
        if cache.codec.kind != "hidden":
            return None, True, False
        reference = cache.teacher
    config = known_or_found(reference, known)
    is_known = count(config) is not None
    return (config if is_known else None), is_cache, not is_known


def _teacher_bytes(teacher: Config | None, compute: ComputeSpec, room: Room) -> int:
    wanted = compute.teacher_precision
    if wanted == "auto":
        stored = str((teacher or {}).get("dtype") or (teacher or {}).get("torch_dtype"))
        wanted = "bfloat16" if room.on_gpu and compute.teacher_device != "cpu" and stored in HALF else "float32"
    return 2 if wanted in HALF else 4


def lines(job: Job, batch_size: int, compute: ComputeSpec, room: Room) -> Iterator[str]:
    """The forecast in words: memory, checkpoints, and what to change when it does not fit."""
    memory = job.memory()
    parts = [f"{field.name} {amount(getattr(memory, field.name))}" for field in fields(memory)]
    where = "a GPU" if room.on_gpu else "a process on a CPU, beside the libraries' half a GB"
    at_once = f"{job.micro_batch_size} x {job.sequence_length:,}"
    yield f"memory of {where}: {amount(memory.total)} = " + " + ".join(
        [part for part, field in zip(parts, fields(memory), strict=True) if getattr(memory, field.name)]
        + ["the teacher, whose config is not on this machine"] * job.lacks_teacher
    )
    if room.on_gpu and compute.devices == "auto" and room.num_gpus is None and not job.alone:
        yield "compute.devices: auto is counted as one GPU a machine, as none is seen here"
    copy = ", and a copy in the machine's own memory" if job.writes_behind else ""
    yield (
        f"{batch_size * job.sequence_length:,} tokens a step, {at_once} at once; a checkpoint is "
        f"{amount(job.checkpoint_bytes())}, up to {compute.keep_checkpoints + 1} on disk at a time{copy}"
    )
    if job.sharded and job.num_processes > 1:
        yield (
            f"the first process reads the models into {amount(job.read_bytes())} of its machine's own memory and sends "
            "the others their shares"
        )
    if room.num_bytes is not None and memory.total > room.num_bytes:
        yield f"does not fit into {amount(room.num_bytes)}: {_mend(job, batch_size, room.num_bytes, compute)}"


def _mend(job: Job, batch_size: int, num_bytes: float, compute: ComputeSpec) -> str:
    """The least change that makes it fit."""
    for change, changed in _changes(job, batch_size, compute):
        if (need := changed.memory().total) <= num_bytes:
            return f"{change} would need {amount(need)}"
    return "no setting of compute is enough; train adapters (lora), name a cached teacher, or take a smaller student"


def _changes(job: Job, batch_size: int, compute: ComputeSpec) -> Iterator[tuple[str, Job]]:
    """Changes of compute in the order of what they cost."""
    share = batch_size // job.num_processes
    words: list[str] = []
    if job.memory().checkpoint:
        job, words = replace(job, writes_behind=False), ["compute.write_checkpoints: at_once"]
        yield words[0], job
    smaller = [size for size in range(job.micro_batch_size - 1, 0, -1) if share % size == 0]
    for size in smaller:
        fewer = ", ".join([*words, f"compute.micro_batch_size: {size}"])
        yield fewer, replace(job, micro_batch_size=size, accumulates=True)
    least = job
    if not job.checkpointing:
        least, words = replace(least, checkpointing=True), [*words, "compute.gradient_checkpointing: true"]
        yield ", ".join(words), least
    if smaller:
        least, words = replace(least, micro_batch_size=1, accumulates=True), [*words, "compute.micro_batch_size: 1"]
        yield ", ".join(words), least
    if compute.names_gpu_of_teacher:  # which is one of those that would share
        least, words = replace(least, head_only=least.is_cached), [*words, "compute.teacher_device: auto"]
    yield from _shared_out(least, words, batch_size)
    if job.teacher is not None and not job.head_only and not job.on_cpu:
        least, words = replace(least, head_only=True), [*words, "compute.teacher_device: cpu"]
        yield ", ".join(words), least
        yield from _shared_out(least, words, batch_size)


def _shared_out(job: Job, words: list[str], batch_size: int) -> Iterator[tuple[str, Job]]:
    if job.on_cpu or job.alone:
        return  # the processes of a CPU would share the memory too
    for num in (2, 4, 8, 16, 32, 64):
        if num > (job.num_processes if job.sharded else 1) and batch_size % num == 0:
            sharded = replace(job, num_processes=num, sharded=True)
            yield ", ".join([*words, f"compute.strategy: fsdp with {num} GPUs (compute.devices x num_nodes)"]), sharded


def amount(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
