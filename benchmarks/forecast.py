"""The memory forecast of ``distill check``, compared with the measured memory of a training, in bytes of tensors.

Llamas with random weights are trained for two optimizer steps by distill, with a teacher of the same size. On a CPU,
every tensor that an operation creates is counted until it is freed, so the memory of the libraries is not included. On
a GPU the figure is PyTorch's ``max_memory_allocated``.
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
from distill.core.batch import causal_batch
from distill.forecast.memory import MemoryModel
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
    """Counts the bytes of all live tensors.

    Attributes:
        now: current number of bytes.
        peak: largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until it is freed; views of the same storage are counted once."""
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
    """Measure the peak memory of the ``with`` block, including the models, as the only item of the list."""
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


def measured(model: MemoryModel, device: str) -> int:
    """Peak number of bytes in two optimizer steps."""
    config = LlamaConfig(**{key: value for key, value in model.student.items() if key != "model_type"})
    teacher = LlamaForCausalLM(config)
    start = LlamaForCausalLM(config)
    student = assemble(start, lora=model.lora, gradient_checkpointing=model.checkpointing)
    module = DistillationModule(student.model, [ForwardKL()], teacher)
    num_micro = 2 if model.accumulates else 1
    ids = torch.randint(0, config.vocab_size, (model.micro_batch_size, model.sequence_length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batch = causal_batch(ids, mask)
    small = {name: tensor[:1, :8] for name, tensor in batch.items()}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, counted([teacher, student.model], device) as peak:
        fit(
            module,
            BudgetSpec(num_steps=2, batch_size=num_micro * model.micro_batch_size, validate_every_steps=2),
            ComputeSpec(
                accelerator="gpu" if device == "cuda" else "cpu",
                precision=model.precision,
                micro_batch_size=model.micro_batch_size,
                checkpoint_every_steps=10**9,
            ),
            name="forecast",
            folder=Path(folder),
            tokens_per_sequence=model.sequence_length,
            train_loader=lambda micro, consumed: [batch] * 2 * num_micro,
            validation_loader=DataLoader([small], batch_size=None),  # type: ignore[arg-type]
        )
    return peak[0]


def memory_model_of(size: str, rows: int, length: int, on_cpu: bool) -> MemoryModel:
    """The memory model of a training of a Llama of this size with default settings."""
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
    return MemoryModel(
        student=config,
        teacher=config,
        teacher_bytes=4,
        head_only=False,
        lora=None,
        quantized=False,
        is_in_place=True,
        precision="32-true",
        micro_batch_size=rows,
        accumulates=False,
        sequence_length=length,
        checkpointing=False,
        on_cpu=on_cpu,
    )


def compare(model: MemoryModel, way: str, device: str) -> dict[str, Any]:
    """A row: forecast and measurement, in total, and without weights, gradients, moments and teacher."""
    memory, peak = model.memory(), measured(model, device)
    fixed = memory.student + memory.gradients + memory.optimizer + memory.teacher
    return {
        "training": way,
        "tokens at once": model.micro_batch_size * model.sequence_length,
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
    parser.add_argument("--rows", type=int, default=2, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=result.FOLDER)
    given = parser.parse_args(arguments)
    plain = memory_model_of(given.size, given.rows, given.length, given.device == "cpu")
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
            f"A Llama of {given.size} with a teacher of the same size and forward KL; two steps, in bytes of tensors.",
            "The memory of weights, gradients, moments and teacher is exact; the last two columns do not include it.",
        ],
        folder=given.out,
    )


if __name__ == "__main__":
    main()
