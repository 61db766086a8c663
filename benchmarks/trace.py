"""Memory, traffic and minimum times of distilling 8B to 4.5B on GPUs, traced without a GPU: writes docs/gpus.md.

The cases are traced by :mod:`distill.trace`, each for two optimizer steps; ``make trace`` runs it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.core.world import World
from distill.forecast.memory import MemoryModel
from distill.losses import AnyLossSpec, ForwardKL, LossSpec
from distill.models.lora import LoraSpec
from distill.stages.forecast import FakeQuant, Training
from distill.trace.figures import Figures
from distill.trace.gpus import GPUS, REACHED_BANDWIDTH, REACHED_FLOPS
from distill.trace.jobs import Job, Source
from distill.trace.roofline import part, repeated, step_time
from distill.trace.trace_process import Tracer
from distill.training.spec import BudgetSpec

PAGE = Path(__file__).parents[1] / "docs" / "gpus.md"
RESULTS = Path(__file__).with_name("trace.json")


HEAD = """\
# Memory and time on GPUs, traced without a GPU

<!-- made by `make trace` (benchmarks/trace.py); change the text there -->

`distill check recipe.yaml --trace` runs the real training step of each training stage on tensors that have shapes but
no values, as if GPUs were there, and prints the peak memory by phase, kernels, places where the CPU waits for the GPU,
traffic, collectives, and the minimum time of a step on a named GPU:

    distill check recipes/llama-3.1-8b-to-4b-width.yaml --trace --gpu H100 --devices 8 --nodes 2

It needs no GPU, downloads nothing and writes nothing into the run folder. The config of each model must be on the
machine, or be one that comes with distill. A C++ compiler is needed once; the compiled file is kept in
`$XDG_CACHE_HOME/distill`. A stage takes seconds for a small model and a minute or two for 8B.

## Llama 3.1 8B to 4.5B, 8192 tokens

A step has two micro-batches of one sequence on each GPU, in bf16-mixed, with forward KL. The peak counts the bytes of
tensors, without the CUDA context, workspaces and fragmentation (about 2 GB). Nothing here was measured on a GPU.
"""


def llama(
    hidden: int, neurons: int, layers: int, vocabulary: int, heads: int, groups: int, size: int
) -> dict[str, Any]:
    """The config of a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "max_position_embeddings": 131_072,
    }


def job_of(
    name: str,
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    *,
    losses: Sequence[AnyLossSpec] = (ForwardKL(),),
    source: Source = "live",
    lora: LoraSpec | None = None,
    fake_quant: FakeQuant | None = None,
    processes: int = 1,
    sharded: bool = False,
    micro_batches: int = 2,
    rows: int = 1,
    length: int = 8192,
    checkpointing: bool = False,
    precision: Any = "bf16-mixed",
    has_documents: bool = False,
) -> Job:
    """A training; settings that are not given are those of a stage on a GPU."""
    on_logits = [loss for loss in losses if isinstance(loss, LossSpec)]
    memory = MemoryModel(
        student=student,
        teacher=teacher if source in ("live", "hidden states") else None,
        teacher_bytes=2,
        head_only=source in ("hidden states", "some tokens"),
        is_cached=source in ("hidden states", "some tokens"),
        lora=lora,
        quantized=fake_quant is not None,
        is_in_place=len(on_logits) == 1 and on_logits[0].has_in_place,
        is_own_teacher=source == "own weights",
        precision=precision,
        micro_batch_size=rows,
        accumulates=micro_batches > 1,
        sequence_length=length,
        checkpointing=checkpointing,
        on_cpu=False,
        num_processes=processes,
        sharded=sharded,
    )
    budget = BudgetSpec(num_steps=10, batch_size=rows * micro_batches * processes)
    training = Training(budget, list(losses), "teacher", lora, fake_quant)
    return Job(name, memory, training, World(0, processes, 0, min(8, processes)), micro_batches, has_documents)


TEACHER = llama(4096, 14336, 32, 128_256, 32, 8, 128)
STUDENT = llama(3072, 9216, 32, 128_256, 32, 8, 128)
CASES = {
    "1 GPU, checkpointing": {"checkpointing": True},
    "1 GPU": {},
    "1 GPU, checkpointing, documents": {"checkpointing": True, "has_documents": True},
    "1 GPU, lora r=256, checkpointing": {"checkpointing": True, "lora": LoraSpec(r=256)},
    "ddp, 8 GPUs, checkpointing": {"checkpointing": True, "processes": 8},
    "fsdp, 8 GPUs, checkpointing": {"checkpointing": True, "processes": 8, "sharded": True},
    "fsdp, 8 GPUs": {"processes": 8, "sharded": True},
    "fsdp, 64 GPUs": {"processes": 64, "sharded": True},
}


def row(name: str, job: Job, figures: Figures) -> dict[str, Any]:
    """The row of a case on the page."""
    works = list(repeated(figures, job.num_micro_batches))
    gpu = GPUS["H200"]
    whole, time = part(works, gpu), step_time(figures, gpu, job.world, job.num_micro_batches)
    return {
        "case": name,
        "forecast": job.memory.memory().total,
        "peak": figures.peak_bytes,
        "phase": figures.peak_phase,
        "kernels": whole.kernels,
        "bytes": whole.num_bytes,
        "flops": whole.flops,
        "waits": figures.waits_per_micro_batch(),
        "collectives": sum(work.count for work in works if work.kind == "collective"),
        "collective_bytes": sum(work.count * work.num_bytes for work in works if work.kind == "collective"),
        "micro_batches": job.num_micro_batches,
        "times": {gpu.name: asdict(step_time(figures, gpu, job.world, job.num_micro_batches)) for gpu in GPUS.values()},
        "seconds": figures.seconds,
        "mfu": time.mfu,
    }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/gpus.md."""
    lines = [
        HEAD,
        "| case | forecast GB | traced peak GB | forecast / traced | phase of the peak | kernels | moved GB | TFLOP "
        "| CPU-GPU synchronisations per micro-batch | collectives, GB |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        lines.append(
            f"| {one['case']} | {one['forecast'] / 1e9:.2f} | {one['peak'] / 1e9:.2f} | "
            f"{one['forecast'] / one['peak']:.3f} | {one['phase']} | {one['kernels']:,} | {one['bytes'] / 1e9:,.0f} | "
            f"{one['flops'] / 1e12:,.0f} | {one['waits']:g} | {one['collectives']:,}, "
            f"{one['collective_bytes'] / 1e9:,.0f} |"
        )
    names = [name for name, gpu in GPUS.items() if gpu.memory_bytes > 50e9]
    lines += [
        "",
        "## Minimum time of a micro-batch, and the largest possible MFU",
        "",
        f"Each kernel is assumed to run at {REACHED_FLOPS:.0%} of the GPU's FLOP/s or {REACHED_BANDWIDTH:.0%} of its "
        "bandwidth, whichever is",
        "slower, without gaps; collectives are assumed to overlap fully with kernels. The figures of the GPUs, with",
        "sources, are in distill/trace/gpus.py.",
        "",
        "| case | " + " | ".join(f"{name} ms | MFU" for name in names) + " |",
        "|---|" + "---:|---:|" * len(names),
    ]
    for one in rows:
        cells = []
        for name in names:
            time = one["times"][name]
            seconds = max(time["kernel_seconds"], time["collective_seconds"])
            cells.append(f"{seconds / one['micro_batches'] * 1e3:,.0f} | {time['mfu']:.2f}")
        lines.append(f"| {one['case']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What a trace does not show",
        "",
        "How kernels overlap, and how long the CPU takes to launch them; the memory of NCCL and the allocator;",
        "anything that depends on tensor values (generation with `on_policy`, loss scaling), and writing checkpoints.",
        "`compute.compile` is not traced.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Trace the requested cases, keep the results of the others, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", help="trace these cases alone", choices=[*CASES])
    parser.add_argument("--page", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    known = {one["case"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.is_file() else {}
    with Tracer() as tracer:
        for name in [] if arguments.page else arguments.only or CASES:
            job = job_of(name, STUDENT, TEACHER, **CASES[name])
            known[name] = row(name, job, tracer.trace(job))
            print(name, f"{known[name]['peak'] / 1e9:.2f} GB, {known[name]['seconds']:.0f} s", flush=True)
            RESULTS.write_text(json.dumps(list(known.values()), indent=1) + "\n")
    PAGE.write_text(page([known[name] for name in CASES if name in known]))


if __name__ == "__main__":
    main()
