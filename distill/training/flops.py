"""FLOPs per training token, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

from typing import Any

from distill.training.module import DistillationModule


def flops_per_token(module: DistillationModule) -> float:
    """Model FLOPs per training token.

    They are 2 per weight of the teacher, and 6 per trained or 4 per frozen weight of the student. An input embedding is
    a lookup and is not counted. The matrix products within attention are not counted either; they are small compared
    with those of the weights at usual sequence lengths. Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    asked = module.teacher.model if module.teacher is not None else None
    teacher = _multiplied(asked) if asked is not None else 0
    trained = sum(p.numel() for p in module.student.parameters() if p.requires_grad)
    student = _multiplied(module.student)
    return 2.0 * teacher + 4.0 * student + 2.0 * min(trained, student)


def _multiplied(model: Any) -> int:
    """Number of weights that take part in matrix products."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding.weight else embedding.weight.numel()
    return sum(p.numel() for p in model.parameters()) - looked_up
