from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import strategy

from distill.core.errors import InputError, MachineError
from distill.training.checkpoint import AtomicCheckpointIO
from distill.training.metrics import read_rows
from distill.training.module import DistillationModule
from distill.training.saver import Checkpoints
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


def test_validation_is_four_times_a_run_unless_asked_otherwise(module: Any, train: Any, tmp_path: Path) -> None:
    train(module(), num_steps=8, validate_every_steps=None)
    assert [row["step"] for row in read_rows(tmp_path / "stage") if "val/kl" in row] == [2, 4, 6, 8]


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
    names |= {"perf/data_wait_share", "perf/model_tflops_per_s", "perf/steps_per_s"}
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


def test_the_end_keeps_nothing_but_the_model_in_memory(
    module: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's teardown would move the optimizer's moments to the memory of the machine."""
    left: list[int] = []
    move = strategy._optimizers_to_device
    monkeypatch.setattr(
        strategy,
        "_optimizers_to_device",
        lambda optimizers, device: (left.extend(len(one.state) for one in optimizers), move(optimizers, device)),
    )
    train(module())
    assert left[-1] == 0


def test_other_processes_than_the_first_do_not_keep_the_model(module: Any, tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    saver = Checkpoints(tmp_path, files, every=1)
    trained, optimizer = module(), SimpleNamespace(state={1: "moments"})
    trainer: Any = SimpleNamespace(global_rank=0, optimizers=[optimizer], strategy=None)
    sizes = [p.numel() for p in trained.parameters()]
    saver._drop(trainer, trained)
    assert optimizer.state == {}
    assert [p.numel() for p in trained.parameters()] == sizes
    saver.pending_validation, trainer.global_rank = True, 1
    saver._drop(trainer, trained)
    assert [p.numel() for p in trained.parameters()] == sizes
    saver.pending_validation = False
    saver._drop(trainer, trained)
    assert sum(p.numel() for p in trained.parameters()) == 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_checkpoint_for_a_gpu_is_mapped(on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint({"state_dict": {"w": torch.arange(3.0)}}, tmp_path / "step=1.ckpt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    asked: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (asked.append(kwargs["mmap"]), load(*args, **kwargs))[1])
    assert files.load_checkpoint(tmp_path / "step=1.ckpt")["state_dict"]["w"].tolist() == [0, 1, 2]
    assert asked == [on_gpu]


def test_rotary_frequencies_stay_exact_in_bf16(module: Any, train: Any) -> None:
    """Rounded to bf16, the cosine of position 1024 would be wrong by 0.9."""
    trained = module()
    rotary = trained.student.base_model.rotary_emb
    exact, seen = rotary.inv_freq.clone(), []
    rotary.register_forward_hook(lambda *_: seen.append((rotary.inv_freq.dtype, rotary.inv_freq.clone())))
    train(trained, num_steps=1, validate_every_steps=1, precision="bf16-true", checkpoint_every_steps=1)
    assert trained.student.lm_head.weight.dtype == torch.bfloat16
    assert {dtype for dtype, _ in seen[-3:]} == {torch.float32}
    assert all(torch.equal(one, exact) for _, one in seen)
