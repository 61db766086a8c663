"""Which losses can be used with a task, and which train it without a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.core.errors import InputError
from distill.core.tasks import MaskedLM, ModelTask
from distill.losses import AnyLossSpec, CrossEntropy, EmbeddingCosine, LabelMSE, LossSpec, ScoreMSE


def losses_on_text(task: ModelTask) -> list[LossSpec]:
    """The losses of a training without a teacher.

    Raises:
        InputError: the task has no labels to train on.
    """
    if task.kind == "embedding":
        raise InputError(
            "task: embedding has no labels to train on without a teacher; use kind: distill with embedding_cosine, or "
            "set another task"
        )
    return [LabelMSE()] if task.kind == "regression" else [CrossEntropy()]


def validation_losses(task: ModelTask) -> list[LossSpec]:
    """The losses that are measured while a model trains; those that need a teacher are left out without one."""
    if task.kind == "embedding":
        return [EmbeddingCosine()]
    return [LabelMSE(), ScoreMSE()] if task.kind == "regression" else [CrossEntropy()]


def unfit(losses: Sequence[AnyLossSpec], task: ModelTask) -> Iterator[str]:
    """Losses that cannot be computed for a task, each in one line."""
    fit = {"embedding": "embedding_cosine", "regression": "score_mse or label_mse"}
    for loss in losses:
        if not isinstance(loss, LossSpec):
            continue
        if loss.compares != task.compares:
            wanted = fit.get(task.kind, "a loss on distributions, such as forward_kl")
            yield f"{loss.kind} does not fit task: {task.kind}; use {wanted}"
        elif task.compares == "values" and loss.kind not in fit[task.kind]:
            yield f"{loss.kind} does not fit task: {task.kind}; use {fit[task.kind]}"
        elif isinstance(task, MaskedLM) and task.positions == "all" and loss.needs_text and loss.needs_teacher:
            yield f"{loss.kind} reads the text and the teacher at the same positions; set task.positions: masked"
