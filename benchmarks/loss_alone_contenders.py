"""Implementations of a distillation loss on final hidden states: distill, plain PyTorch, and the installed peers.

Each is a function of a :class:`Case` that returns a loss with a graph. If a peer is missing or fails, the exception is
written to the notes of the benchmark.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5}


@dataclass
class Case:
    """One batch: hidden states [tokens, width] of both models, the ids of the next tokens, and both heads."""

    hidden: Tensor
    head: nn.Linear
    teacher_hidden: Tensor
    teacher_head: nn.Linear
    targets: Tensor

    @classmethod
    def make(cls, tokens: int, vocabulary: int, width: int, teacher_width: int, **where: Any) -> Case:
        """A random case, whose logits have the standard deviation of those of a language model (3)."""
        random = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(**where)

        heads = []
        for size in (width, teacher_width):
            head = nn.Linear(size, vocabulary, bias=False, **where)
            head.weight.data = numbers(vocabulary, size).mul_(3 / size**0.5)
            heads.append(head)
        heads[1].requires_grad_(False)
        targets = torch.randint(0, vocabulary, (tokens,), generator=random).to(where.get("device"))
        return cls(numbers(tokens, width).requires_grad_(), heads[0], numbers(tokens, teacher_width), heads[1], targets)

    def both_logits(self) -> tuple[Tensor, Tensor]:
        """Logits of all tokens, [tokens, vocabulary]; the student's have a graph."""
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher_hidden)
        return self.head(self.hidden), teacher


Contender = Callable[[Case, str], Tensor]


def distill(case: Case, kind: str) -> Tensor:
    from distill.losses import LOSSES
    from distill.losses.head_losses import Head, Signal, head_losses

    head = Head(case.head, tuple(case.head.parameters()))
    signal = Signal(case.teacher_hidden.unsqueeze(0), Head(case.teacher_head))
    mask = torch.ones_like(case.targets, dtype=torch.bool).unsqueeze(0)
    loss = LOSSES[kind](kind=kind)
    return head_losses(case.hidden.unsqueeze(0), head, signal, case.targets.unsqueeze(0), mask, [(kind, loss)])[0]  # type: ignore[list-item]


def plain(case: Case, kind: str) -> Tensor:
    student, teacher = (logits.float().log_softmax(-1) for logits in case.both_logits())
    if kind == "forward_kl":
        return functional.kl_div(student, teacher, reduction="sum", log_target=True)
    half = torch.tensor(0.5, device=student.device).log()
    m = torch.logaddexp(student + half, teacher + half)
    of_teacher, of_student = (functional.kl_div(m, x, reduction="sum", log_target=True) for x in (teacher, student))
    return 0.5 * (of_teacher + of_student)


def trl_gkd(case: Case, kind: str) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = case.both_logits()
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETAS[kind], reduction="sum")


def trl_chunked(case: Case, kind: str) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, teacher_hidden = case.hidden.unsqueeze(0), case.teacher_hidden.unsqueeze(0)
    weights = case.head.weight, case.teacher_head.weight
    mask = torch.ones_like(case.targets).unsqueeze(0)
    return _chunked_divergence_loss(hidden, teacher_hidden, *weights, mask, BETAS[kind])[0]


def _liger(chunk_size: int, compiled: bool) -> Contender:
    def liger(case: Case, kind: str) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[kind], compiled=compiled, chunk_size=chunk_size
        )
        weights = case.head.weight, case.teacher_head.weight
        return loss(case.hidden, weights[0], case.teacher_hidden, weights[1], case.targets)

    return liger


def liger_triton(case: Case, kind: str) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    weights = case.head.weight, case.teacher_head.weight
    loss = LigerFusedLinearJSD(jsd_beta=BETAS[kind])
    return loss(case.hidden, weights[0], case.teacher_hidden, weights[1], case.targets)


def torchtune(case: Case, kind: str) -> Tensor:
    if kind != "forward_kl":
        raise NotImplementedError("torchtune has no Jensen-Shannon loss")
    # only this file, because the package imports names that newer versions of torchao do not have
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'torchtune'")
    file = Path(package.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("kd_losses", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)
    student, teacher = (logits.unsqueeze(0).chunk(8, dim=1) for logits in case.both_logits())
    return loss(list(student), list(teacher), case.targets.unsqueeze(0))


def contenders(device: str, compiled: bool) -> dict[str, Contender]:
    """Name in the table -> implementation, for a device; ``compiled`` adds Liger's default, which compiles."""
    found = {
        "distill": distill,
        "plain PyTorch": plain,
        "TRL GKD": trl_gkd,
        "TRL chunked": trl_chunked,
        "Liger chunked": _liger(1024, False),
        "Liger chunked, 256": _liger(256, False),
        "torchtune": torchtune,
    }
    if compiled:
        found |= {"Liger chunked, compiled": _liger(1024, True)}
    if device == "cuda":
        found |= {"Liger Triton": liger_triton}
    return found
