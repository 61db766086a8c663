"""Tiny trainings that are traced, and the figures that they may not exceed.

``python -m tests.trace.cases`` traces all of them and writes what they have now to ``recorded.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.trace import job_of, llama
from distill.losses import LOSSES, CrossEntropy, ForwardKL, LossSpec
from distill.models.lora import LoraSpec
from distill.quantization import ACTIVATIONS, QUANTIZERS, Int8Channel
from distill.stages.forecast import FakeQuant
from distill.trace.figures import Figures
from distill.trace.jobs import Job
from distill.trace.trace_process import Tracer

RECORDED = Path(__file__).with_name("recorded.json")
TEACHER = llama(256, 512, 1, 2048, 4, 2, 64)
STUDENT = llama(256, 256, 1, 2048, 4, 2, 64)
LENGTH = 256


def case(name: str, **settings: Any) -> Job:
    return job_of(name, STUDENT, TEACHER, **{"length": LENGTH, "micro_batches": 1} | settings)


def cases() -> dict[str, Job]:
    """All of them by name; those of CORE are traced in every run of the tests."""
    found = {
        "distill": case("distill", micro_batches=2),
        "finetune": case("finetune", losses=[CrossEntropy()], source="none"),
        "own teacher": case("own teacher", source="own weights", lora=LoraSpec(r=4)),
        "cached hidden states": case("cached hidden states", source="hidden states"),
        "cached tokens": case("cached tokens", source="some tokens"),
        "checkpointing": case("checkpointing", checkpointing=True, micro_batches=2),
        "bf16-true": case("bf16-true", precision="bf16-true"),
        "32-true": case("32-true", precision="32-true"),
        "documents": case("documents", has_documents=True),
        "padded": case("padded", rows=3, length=64),
        "lora": case("lora", lora=LoraSpec(r=8)),
        "quantized lora": case("quantized lora", lora=LoraSpec(r=8), fake_quant=FakeQuant(Int8Channel())),
        "quantized cache": case("quantized cache", fake_quant=FakeQuant(Int8Channel(), kv_cache="q8_0")),
        "ddp 8": case("ddp 8", processes=8, micro_batches=2),
        "ddp 8 of one micro-batch": case("ddp 8 of one micro-batch", processes=8),
        "fsdp 8": case("fsdp 8", processes=8, sharded=True, micro_batches=2),
        "fsdp 8 lora": case("fsdp 8 lora", processes=8, sharded=True, lora=LoraSpec(r=8)),
        "fsdp 8 quantized": case("fsdp 8 quantized", processes=8, sharded=True, fake_quant=FakeQuant(Int8Channel())),
        "fsdp 64": case("fsdp 64", processes=64, sharded=True, checkpointing=True),
    }
    for kind, loss in LOSSES.items():
        if loss.compares == "values":  # of encoders' tasks; the models here predict next tokens
            continue
        losses = [loss()] if issubclass(loss, LossSpec) else [ForwardKL(), loss()]
        found.setdefault(f"loss {kind}", case(f"loss {kind}", losses=losses))
    for kind, grid in QUANTIZERS.items():
        found[f"quantizer {kind}"] = case(f"quantizer {kind}", fake_quant=FakeQuant(grid()))
    for kind, activations in ACTIVATIONS.items():
        quant = FakeQuant(Int8Channel(), activations=activations())
        found[f"activations {kind}"] = case(f"activations {kind}", fake_quant=quant)
    return found


CORE = (
    "distill", "finetune", "own teacher", "cached hidden states", "cached tokens", "checkpointing", "bf16-true",
    "documents", "quantized lora", "ddp 8", "fsdp 8", "fsdp 64", "loss jensen_shannon",
)  # fmt: skip


def figures_of(figures: Figures) -> dict[str, float]:
    """What is recorded of a case."""
    return {
        "peak_bytes": figures.peak_bytes,
        "kernels": figures.kernels(),
        "moved_bytes": figures.moved_bytes(),
        "collectives": figures.collectives(),
        "waits_per_micro_batch": figures.waits_per_micro_batch(),
    }


def main() -> None:
    found = {}
    with Tracer() as tracer:
        for name, job in cases().items():
            found[name] = figures_of(figures := tracer.trace(job))
            ratio = job.memory.memory().total / figures.peak_bytes
            print(f"{name}: forecast / peak {ratio:.3f} in {figures.peak_phase}, {figures.seconds:.1f} s", flush=True)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
