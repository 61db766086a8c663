"""The memory that ``distill check`` forecasts beside what a training takes, in bytes of tensors.

Llamas of random weights are trained for two optimizer steps by distill itself, with a teacher of the same size. On a
CPU every tensor that an operation makes is counted from its birth to its death, so nothing of the libraries' own memory
is in it; on a GPU the figure is PyTorch's ``max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import hardware, result
from distill.forecast.memory import Job
from distill.losses import ForwardKL
from distill.models.lora import LoraSpec
from distill.training.assemble import assemble
from distill.training.module import DistillationModule
from distill.training.spec import BudgetSpec, ComputeSpec
from distill.training.trainer import fit

SIZES = {
    "67M": {"hidden": 512, "neurons": 1408, "layers": 16, "heads": 8, "groups": 4, "vocabulary": 16_384},
    "1B": {"hidden": 2048, "neurons": 5632, "layers": 20, "heads": 16, "groups": 8, "vocabulary": 32_768},
    "tiny": {"hidden": 32, "neurons": 64, "layers": 2, "heads": 4, "groups": 2, "vocabulary": 300},
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "two micro-batches": {"accumulates": True},
    "gradient checkpointing": {"checkpointing": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "adapters of rank 16": {"lora": LoraSpec(r=16)},
}


class Bytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive.

    Attributes:
        now: of those that it knows.
        peak: the most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until it dies; views of one storage count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@contextlib.contextmanager
def counted(models: list[nn.Module], device: str) -> Iterator[list[int]]:
    """What the block takes at its peak, with the models that are there already, as the one item of a list."""
    peak: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
        return
    count = Bytes()
    for model in models:
        for parameter in model.parameters():
            count.add(parameter)
    with count:
        yield peak
    peak.append(count.peak)


def measured(job: Job, device: str) -> int:
    """Bytes at the peak of two optimizer steps."""
    config = LlamaConfig(**{key: value for key, value in job.student.items() if key != "model_type"})
    teacher = LlamaForCausalLM(config)
    start = LlamaForCausalLM(config)
    student = assemble(start, lora=job.lora, gradient_checkpointing=job.checkpointing)
    module = DistillationModule(student.model, [ForwardKL()], teacher)
    num_micro = 2 if job.accumulates else 1
    ids = torch.randint(0, config.vocab_size, (job.micro_batch_size, job.sequence_length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batch = {"input_ids": ids, "mask": mask}
    small = {name: tensor[:1, :8] for name, tensor in batch.items()}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, counted([teacher, student.model], device) as peak:
        fit(
            module,
            BudgetSpec(num_steps=2, batch_size=num_micro * job.micro_batch_size, validate_every_steps=2),
            ComputeSpec(
                accelerator="gpu" if device == "cuda" else "cpu",
                precision=job.precision,
                micro_batch_size=job.micro_batch_size,
                checkpoint_every_steps=10**9,
            ),
            name="forecast",
            folder=Path(folder),
            tokens_per_sequence=job.sequence_length,
            train_loader=lambda micro, consumed: [batch] * 2 * num_micro,
            validation_loader=DataLoader([small], batch_size=None),  # type: ignore[arg-type]
        )
    return peak[0]


def job_of(size: str, rows: int, length: int, on_cpu: bool) -> Job:
    """The plainest training of a Llama of this size."""
    s = SIZES[size]
    config = LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["hidden"],
        intermediate_size=s["neurons"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["groups"],
        max_position_embeddings=length,
    ).to_dict()
    return Job(
        student=config,
        teacher=config,
        teacher_bytes=4,
        head_only=False,
        lora=None,
        quantized=False,
        lone_forward_kl=True,
        precision="32-true",
        micro_batch_size=rows,
        accumulates=False,
        sequence_length=length,
        checkpointing=False,
        on_cpu=on_cpu,
    )


def compare(job: Job, way: str, device: str) -> dict[str, Any]:
    """A row: forecast beside measurement, whole and without what the parameters decide alone."""
    memory, peak = job.memory(), measured(job, device)
    fixed = memory.student + memory.gradients + memory.optimizer + memory.teacher
    return {
        "training": way,
        "tokens at once": job.micro_batch_size * job.sequence_length,
        "measured MB": round(peak / 1e6, 1),
        "forecast MB": round(memory.total / 1e6, 1),
        "forecast / measured": round(memory.total / peak, 3),
        "activations and losses, MB": round((peak - fixed) / 1e6, 1),
        "their forecast / measured": round((memory.total - fixed) / (peak - fixed), 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table and write ``results/forecast.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="67M")
    parser.add_argument("--rows", type=int, default=2, help="sequences at once")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=result.FOLDER)
    given = parser.parse_args(arguments)
    plain = job_of(given.size, given.rows, given.length, given.device == "cpu")
    found = []
    for way, changes in WAYS.items():
        found.append(compare(replace(plain, **changes), way, given.device))
        print(found[-1], flush=True)
    result.write(
        "forecast",
        command=f"python -m benchmarks.forecast --size {given.size} --rows {given.rows} --length {given.length} "
        f"--device {given.device}",
        hardware=hardware.describe(),
        versions=hardware.versions("peft"),
        rows=found,
        notes=[
            f"A Llama of {given.size} with a teacher of its size, forward KL; two steps, in bytes of tensors.",
            "What the parameters decide alone - weights, gradients, moments, teacher - is exact; the last two columns "
            "leave it out.",
        ],
        folder=given.out,
    )


if __name__ == "__main__":
    main()
