"""A live teacher's precision and place; see test_module for what else holds of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.core.errors import MachineError
from distill.losses import CrossEntropy, ForwardKL, head_losses
from distill.models.head import head_copy, output_head
from distill.training.live_teacher import LiveTeacher
from distill.training.module import DistillationModule
from distill.training.spec import ComputeSpec
from distill.training.trainer import resolve_teacher

LOSSES = [ForwardKL(), CrossEntropy(weight=0.5)]


def gradient(student: Any, teacher: Any, batch: Any) -> tuple[float, torch.Tensor]:
    module = DistillationModule(student("full").model, LOSSES, teacher)
    total, _ = module.batch_losses(batch, module.losses)
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten() for p in module.student.parameters()])  # type: ignore[union-attr]


def test_a_bf16_teacher_is_near_and_an_fp32_one_is_the_same(student: Any, llama: Any, batch: Any) -> None:
    value, expected = gradient(student, llama(1), batch(0, 6))
    same, exact = gradient(student, LiveTeacher(llama(1).float(), torch.device("cpu")), batch(0, 6))
    assert same == value
    assert torch.equal(exact, expected)
    near, rounded = gradient(student, llama(1).bfloat16(), batch(0, 6))
    assert near == pytest.approx(value, rel=0.02)
    assert not torch.equal(rounded, expected)
    assert float((rounded - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("settings", [{}, {"final_logit_softcapping": 5.0}], ids=["plain head", "soft-cap"])
def test_its_precision_is_its_own_under_mixed_precision(settings: Any, llama: Any, batch: Any) -> None:
    model, one = llama(1, **settings), batch(0, 4)
    teacher = LiveTeacher(model)
    expected = teacher.signal(one)

    def exact(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return output_head(model).logits(rows)

    with torch.autocast("cpu", torch.bfloat16):
        signal = teacher.signal(one)
        assert torch.equal(signal.hidden, expected.hidden)
        student = head_losses.Head(
            exact
        )  # the teacher in fp32: any rounding of the teacher's logits is a distance to it
        targets = one["input_ids"].roll(-1, 1)
        _, terms = head_losses.head_losses(
            signal.hidden.clone(), student, signal, targets, one["mask"], [("kl", ForwardKL())]
        )
    assert abs(float(terms["kl"].per_token())) < 1e-8


def test_a_teacher_elsewhere_sends_hidden_states_a_chunk_at_a_time(llama: Any, monkeypatch: Any) -> None:
    model = llama(1)
    hidden = torch.randn(3, 16)
    copy = head_copy(model, torch.device("cpu"))
    assert torch.equal(copy.logits(hidden), output_head(model).logits(hidden))
    assert all(not p.requires_grad for p in copy.parameters)
    assert copy.parameters[0].data_ptr() != model.get_output_embeddings().weight.data_ptr()
    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "to", watched(torch.Tensor.to, seen))
    rows = torch.zeros(1, 1200, 16)
    signal = head_losses.Signal(rows, copy)
    on = torch.ones(1, 1200, dtype=torch.bool)
    targets, losses = torch.zeros(1, 1200, dtype=torch.int64), [("forward_kl", ForwardKL())]
    head_losses.head_losses(rows, copy, signal, targets, on, losses, chunk_tokens=100)
    assert max(seen) == 100


def watched(to: Any, seen: list[int]) -> Any:
    """``Tensor.to`` that notes the rows of hidden states on their way."""

    def noting(self: torch.Tensor, *where: Any, **how: Any) -> Any:
        if self.ndim == 2 and self.shape[1] == 16 and where and isinstance(where[0], torch.device):
            seen.append(self.shape[0])
        return to(self, *where, **how)

    return noting


def test_where_and_in_what_precision(monkeypatch: Any) -> None:
    assert resolve_teacher(ComputeSpec(accelerator="cpu")) == (torch.device("cpu"), "float32")
    wanted = ComputeSpec(accelerator="cpu", teacher_precision="bfloat16", teacher_device="cpu")
    assert resolve_teacher(wanted) == (torch.device("cpu"), "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_teacher(ComputeSpec()) == (torch.device("cuda"), "auto")
    assert resolve_teacher(ComputeSpec(teacher_device="cpu")) == (torch.device("cpu"), "float32")
    with pytest.raises(MachineError, match=r"compute\.teacher_device: cuda:1: PyTorch sees 1 GPUs"):
        resolve_teacher(ComputeSpec(teacher_device="cuda:1"))
