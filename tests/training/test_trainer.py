from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core.errors import InputError, MachineError
from distill.training.metrics import read_rows
from distill.training.module import DistillationModule
from distill.training.spec import BudgetSpec, ComputeSpec, split_batch
from distill.training.trainer import resolve_device, resolve_precision


def test_a_batch_is_split_into_whole_micro_batches() -> None:
    def split(batch_size: int, micro: int | None) -> tuple[int, int]:
        return split_batch(BudgetSpec(num_steps=1, batch_size=batch_size), ComputeSpec(micro_batch_size=micro))

    assert split(16, None) == (16, 1)
    assert split(16, 4) == (4, 4)
    assert split(4, 16) == (4, 1)
    with pytest.raises(InputError, match=r"batch_size \(16\) must be a multiple of compute.micro_batch_size \(6\)"):
        split(16, 6)


@pytest.mark.parametrize(
    ("gpu", "accelerator", "device", "precision"),
    [
        (False, "auto", "cpu", "32-true"),
        (False, "cpu", "cpu", "32-true"),
        (True, "auto", "cuda", "bf16-mixed"),
        (True, "gpu", "cuda", "bf16-mixed"),
        (True, "cpu", "cpu", "32-true"),
    ],
)
def test_auto_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, accelerator: Any, device: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    compute = ComputeSpec(accelerator=accelerator)
    assert (resolve_device(compute), resolve_precision(compute)) == (device, precision)
    assert resolve_precision(ComputeSpec(accelerator=accelerator, precision="bf16-true")) == "bf16-true"


def test_a_gpu_that_is_not_there_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"compute.accelerator: gpu.*use auto or cpu"):
        resolve_device(ComputeSpec(accelerator="gpu"))


@pytest.mark.parametrize("way", ["full", "lora", "quant head", "quant lora head"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_learns(way: str, precision: str, module: Any, train: Any, batch: Any) -> None:
    """Six steps bring the student nearer to its teacher on what it was trained on."""
    torch.manual_seed(3)  # of the dropout; a few seeds in a hundred learn too little in six steps
    trained = module(way, lr=3e-2)

    def distance() -> float:
        with torch.no_grad():
            return float(trained.batch_losses(batch(0, 24), trained.losses)[1]["kl"].per_token())

    before = distance()
    train(trained, precision=precision)
    assert distance() < 0.9 * before


def test_rows_tell_step_tokens_rate_and_every_loss(module: Any, train: Any, tmp_path: Path) -> None:
    trained = module()
    train(trained)
    rows = read_rows(tmp_path / "stage")
    training = [row for row in rows if "lr" in row]
    assert [row["step"] for row in training] == [2, 4, 6]
    assert [row["tokens"] for row in training] == [64, 128, 192]
    names = {"train/forward_kl", "train/cross_entropy", "train/kl", "perf/tokens_per_s", "memory/peak_bytes"}
    names |= {"perf/data_wait_share", "perf/model_tflops_per_s"}
    assert set(training[0]) == {"step", "tokens", "lr"} | names
    looks = [row for row in rows if "val/kl" in row]
    assert [row["step"] for row in looks] == [2, 4, 6]
    assert set(looks[0]) == {"step", "tokens", "val/cross_entropy", "val/kl"}


@pytest.mark.parametrize(("clip_norm", "given"), [(0.25, 0.25), (0, None)])
def test_the_clip_norm_reaches_the_gradients(
    clip_norm: float, given: float | None, module: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[float | None, float]] = []
    original = DistillationModule.configure_gradient_clipping

    def watch(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        original(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        norm = torch.stack([p.grad.norm() for p in self.student.parameters()]).norm()
        found.append((gradient_clip_val, float(norm)))

    monkeypatch.setattr(DistillationModule, "configure_gradient_clipping", watch)
    trained = module()
    trained.optimizer_spec = trained.optimizer_spec.model_copy(update={"clip_norm": clip_norm})
    train(trained)
    assert [value for value, _ in found] == [given] * 6
    norms = [norm for _, norm in found]
    assert norms == pytest.approx([0.25] * 6, rel=1e-3) if given else min(norms) > 0.25


def test_a_full_disk_is_one_line(module: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MachineError, match="checkpoint cannot be written"):
        train(module())


def test_no_memory_on_the_gpu_names_the_keys_that_mend_it(module: Any, train: Any) -> None:
    def spent() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MachineError, match=r"lower compute.micro_batch_size \(2\)"):
        train(module(), at={4: spent})
