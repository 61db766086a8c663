"""Whether a training stage fits into the memory that is there, and what to change when it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import get_args

from distill.forecast.memory import MemoryModel, Precision
from distill.losses import LossSpec
from distill.models.configs import count, largest
from distill.pruning.layout import Config
from distill.stages.base import View
from distill.stages.forecast import Forecast
from distill.training.spec import ComputeSpec, split_batch

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class MemoryLimit:
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
    def of(cls, compute: ComputeSpec, memory_gb: float | None = None) -> MemoryLimit:
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


def memory_model_of(forecast: Forecast, view: View, limit: MemoryLimit) -> MemoryModel | None:
    """What a stage trains, and how; None when it does not train or its student is not known.

    Raises:
        InputError: its batch does not split.
    """
    training, student, compute = forecast.training, largest(forecast.makes), view.compute
    length = view.data.sequence_length
    if training is None or not training.budget.steps(length) or student is None or count(student) is None:
        return None
    num_processes = 1 if training.is_trial else limit.processes(compute)
    micro, num_micro = split_batch(training.budget, compute, num_processes)
    teacher, is_cached, lacks_teacher = _teacher(training.teacher, view)
    automatic: Precision = "bf16-mixed" if limit.on_gpu else "32-true"
    on_logits = [loss for loss in training.losses if isinstance(loss, LossSpec)]
    return MemoryModel(
        student=student,
        teacher=teacher,
        teacher_bytes=_teacher_bytes(teacher, compute, limit),
        is_cached=is_cached,
        head_only=is_cached or (limit.on_gpu and compute.teacher_device not in ("auto", "cuda", "cuda:0")),
        lora=training.lora,
        quantized=training.fake_quant is not None,
        rounds_head=training.fake_quant is not None and training.fake_quant.embeddings_grid() is not None,
        is_in_place=len(on_logits) == 1 and on_logits[0].has_in_place,
        is_own_teacher=training.teacher is None and any(loss.needs_teacher for loss in training.losses),
        precision=next((p for p in get_args(Precision) if p == compute.precision), automatic),
        micro_batch_size=micro,
        accumulates=num_micro > 1,
        sequence_length=length,
        checkpointing=compute.gradient_checkpointing,
        on_cpu=not limit.on_gpu,
        num_processes=num_processes,
        sharded=compute.strategy == "fsdp" and not training.is_trial,
        is_single_process=training.is_trial,
        lacks_teacher=lacks_teacher,
        writes_behind=compute.write_checkpoints == "behind",
    )


def _teacher(reference: str | None, view: View) -> tuple[Config | None, bool, bool]:
    """The config of the teacher that a stage has in memory, if any; whether it is the head alone; of unknown size."""
    if reference is None:
        return None, False, False
    signal = view.known[reference].signal if reference in view.known else None
    if signal is not None and not signal.needs_head:
        return None, True, False
    config = view.config(reference if signal is None else signal.teacher)
    is_known = count(config) is not None
    return (config if is_known else None), signal is not None, not is_known


def _teacher_bytes(teacher: Config | None, compute: ComputeSpec, limit: MemoryLimit) -> int:
    wanted = compute.teacher_precision
    if wanted == "auto":
        stored = str((teacher or {}).get("dtype") or (teacher or {}).get("torch_dtype"))
        wanted = "bfloat16" if limit.on_gpu and compute.teacher_device != "cpu" and stored in HALF else "float32"
    return 2 if wanted in HALF else 4


def lines(model: MemoryModel, batch_size: int, compute: ComputeSpec, limit: MemoryLimit) -> Iterator[str]:
    """The forecast in words: memory, checkpoints, and what to change when it does not fit."""
    memory = model.memory()
    parts = [f"{field.name} {amount(getattr(memory, field.name))}" for field in fields(memory)]
    where = "a GPU" if limit.on_gpu else "a process on a CPU, beside the libraries' half a GB"
    at_once = f"{model.micro_batch_size} x {model.sequence_length:,}"
    yield f"memory of {where}: {amount(memory.total)} = " + " + ".join(
        [part for part, field in zip(parts, fields(memory), strict=True) if getattr(memory, field.name)]
        + ["the teacher, whose config is not on this machine"] * model.lacks_teacher
    )
    if limit.on_gpu and compute.devices == "auto" and limit.num_gpus is None and not model.is_single_process:
        yield "compute.devices: auto is counted as one GPU per machine, as none is seen here"
    copy = ", and a copy in the machine's own memory" if model.writes_behind else ""
    yield (
        f"{batch_size * model.sequence_length:,} tokens per step, {at_once} at once; a checkpoint is "
        f"{amount(model.checkpoint_bytes())}, up to {compute.keep_checkpoints + 1} on disk at a time{copy}"
    )
    if model.sharded and model.num_processes > 1:
        yield (
            f"the first process reads the models into {amount(model.read_bytes())} of its machine's own memory and "
            "sends the others their shares"
        )
    if limit.num_bytes is not None and memory.total > limit.num_bytes:
        yield f"does not fit into {amount(limit.num_bytes)}: {_advice(model, batch_size, limit.num_bytes, compute)}"


def _advice(model: MemoryModel, batch_size: int, num_bytes: float, compute: ComputeSpec) -> str:
    """The least change that makes it fit."""
    for change, changed in _changes(model, batch_size, compute):
        if (need := changed.memory().total) <= num_bytes:
            return f"{change} would need {amount(need)}"
    return "no setting of compute is enough; train adapters (lora), name a cached teacher, or take a smaller student"


def _changes(model: MemoryModel, batch_size: int, compute: ComputeSpec) -> Iterator[tuple[str, MemoryModel]]:
    """Changes of compute in the order of what they cost."""
    share = batch_size // model.num_processes
    words: list[str] = []
    if model.memory().checkpoint:
        model, words = replace(model, writes_behind=False), ["compute.write_checkpoints: at_once"]
        yield words[0], model
    smaller = [size for size in _divisors(share) if size < model.micro_batch_size]
    for size in smaller:
        fewer = ", ".join([*words, f"compute.micro_batch_size: {size}"])
        yield fewer, replace(model, micro_batch_size=size, accumulates=True)
    least = model
    if not model.checkpointing:
        least, words = replace(least, checkpointing=True), [*words, "compute.gradient_checkpointing: true"]
        yield ", ".join(words), least
    if smaller:
        least, words = replace(least, micro_batch_size=1, accumulates=True), [*words, "compute.micro_batch_size: 1"]
        yield ", ".join(words), least
    if compute.names_gpu_of_teacher:  # which is one of those that would share
        least, words = replace(least, head_only=least.is_cached), [*words, "compute.teacher_device: auto"]
    yield from _sharded(least, words, batch_size)
    if model.teacher is not None and not model.head_only and not model.on_cpu:
        least, words = replace(least, head_only=True), [*words, "compute.teacher_device: cpu"]
        yield ", ".join(words), least
        yield from _sharded(least, words, batch_size)


def _divisors(number: int) -> list[int]:
    """The largest first."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def _sharded(model: MemoryModel, words: list[str], batch_size: int) -> Iterator[tuple[str, MemoryModel]]:
    if model.on_cpu or model.is_single_process:
        return  # the processes of a CPU would share the memory too
    for num in (2, 4, 8, 16, 32, 64):
        if num > (model.num_processes if model.sharded else 1) and batch_size % num == 0:
            sharded = replace(model, num_processes=num, sharded=True)
            yield ", ".join([*words, f"compute.strategy: fsdp with {num} GPUs (compute.devices x num_nodes)"]), sharded


def amount(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
