"""How well a model does its task: metrics on the labels, each with its standard error, and answers row by row.

    classification         accuracy, macro F1, Matthews correlation
    token_classification   accuracy, macro F1, F1 of whole spans
    regression             Pearson and Spearman correlation
    masked_lm              accuracy at the hidden tokens
    embedding              cosine with the teacher's vectors, shared neighbours, accuracy of a neighbour classifier

The metrics are those of torchmetrics. Their standard errors are by a bootstrap over rows (the error of an accuracy of
texts in closed form), because the tokens of a row are not independent.

Source: Efron 1979 (bootstrap); Matthews 1975; Tjong Kim Sang & De Meulder 2003 (F1 of spans).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from distill.core.artifact import hash_of
from distill.core.stop import stoppable
from distill.data.task_corpus import TaskCorpus
from distill.evaluation.neighbours import embedding_metrics
from distill.evaluation.quality import Predictions
from distill.evaluation.spans import span_counts
from distill.evaluation.tasks.base import Answer, Answers
from distill.numerics.statistics import standard_error

RESAMPLES = 200
"""Samples of a bootstrap; the relative error of a standard error from 200 is 5 %."""

Metrics = dict[str, tuple[float, float]]
"""Name of a metric -> (value, standard error)."""


@dataclass(frozen=True)
class TaskQuality:
    """What :func:`measure_task` finds.

    Attributes:
        metrics: see :data:`Metrics`; without those that are not defined, such as a correlation with a constant.
        answers: of a classifier of texts: one per row, to compare models in pairs; None for other tasks.
    """

    metrics: Metrics
    answers: Answers | None = None


@torch.no_grad()
def measure_task(own: Predictions, teacher: Predictions | None, corpus: TaskCorpus, batch_size: int) -> TaskQuality:
    """Measure a model on the validation rows.

    Args:
        own: of what is measured.
        teacher: of its teacher, or None; only embeddings are compared with it here.
        corpus: the data.
        batch_size: rows of a batch.
    """
    kind = corpus.task.kind
    if kind == "embedding":
        return TaskQuality(embedding_metrics(own, teacher, corpus, batch_size))
    outputs, targets, rows = _outputs(own, corpus, batch_size, reduce=kind != "regression")
    if kind == "regression":
        scores, labels = outputs[:, 0].double(), targets.double()
        found = {
            "pearson": _bootstrapped(lambda at: pearson_corrcoef(scores[at], labels[at]), rows),
            "spearman": _bootstrapped(lambda at: spearman_corrcoef(scores[at], labels[at]), rows),
        }
        return TaskQuality(_defined(found))
    answers, right = outputs[:, 0].long(), outputs[:, 0].long() == targets
    found = {"accuracy": _bootstrapped(lambda at: right[at].double().mean(), rows)}
    if kind in ("classification", "token_classification"):
        found |= _of_classes(answers, targets, rows, len(corpus.classes))
    if kind == "token_classification":
        counts = span_counts(answers, targets, rows, corpus.classes)
        if counts is not None:
            found["span_f1"] = _bootstrapped(lambda at: _f1(counts, at), torch.arange(len(counts)))
    if kind != "classification":
        return TaskQuality(_defined(found))
    error = standard_error(int(right.sum()), len(right))
    found["accuracy"] = (float(right.double().mean()), 0.0 if error is None else error)
    return TaskQuality(_defined(found), _answers(answers, targets, corpus))


def _outputs(own: Predictions, corpus: TaskCorpus, batch_size: int, *, reduce: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs [predictions, 1], targets [predictions], row of each in the order of the loader [predictions]).

    ``reduce`` keeps the most likely class alone, so that logits of all tokens never exist at once.
    """
    outputs, targets, rows, seen = list[Tensor](), list[Tensor](), list[Tensor](), 0
    for batch in stoppable(corpus.validation_loader(batch_size)):
        mask = batch["mask"]
        count, chunk = int(mask.sum()), own(batch)
        for start in range(0, count, 1024):
            logits = chunk(slice(start, min(start + 1024, count))).float().cpu()  # [chunk, classes]
            outputs.append(logits.argmax(-1, keepdim=True) if reduce else logits[:, :1])
        targets.append(batch["targets"][mask])
        rows.append(seen + mask.nonzero()[:, 0])
        seen += len(mask)
    return torch.cat(outputs), torch.cat(targets), torch.cat(rows)


def _of_classes(answers: Tensor, targets: Tensor, rows: Tensor, num_classes: int) -> Metrics:
    def f1(at: Tensor) -> Tensor:
        return multiclass_f1_score(answers[at], targets[at], num_classes, average="macro")

    def matthews(at: Tensor) -> Tensor:
        return multiclass_matthews_corrcoef(answers[at], targets[at], num_classes)

    return {"macro_f1": _bootstrapped(f1, rows), "matthews": _bootstrapped(matthews, rows)}


def _bootstrapped(metric: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[float, float]:
    """A metric of all predictions, and its standard error over samples of whole rows.

    Args:
        metric: places of predictions -> scalar.
        rows: of each prediction, rising. [predictions]
    """
    value = float(metric(torch.arange(len(rows))))
    _, sizes = torch.unique_consecutive(rows, return_counts=True)
    starts, random = sizes.cumsum(0) - sizes, np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = torch.from_numpy(random.integers(len(sizes), size=len(sizes)))
        first = torch.repeat_interleave(starts[drawn] - (sizes[drawn].cumsum(0) - sizes[drawn]), sizes[drawn])
        found.append(float(metric(first + torch.arange(len(first)))))
    return value, float(np.nanstd(found, ddof=1)) if np.isfinite(found).any() else 0.0


def _f1(counts: Tensor, rows: Tensor) -> Tensor:
    right, predicted, wanted = counts[rows].sum(0).double()
    return 2 * right / (predicted + wanted).clamp(min=1)


def _defined(found: Metrics) -> Metrics:
    return {name: (value, error) for name, (value, error) in found.items() if np.isfinite([value, error]).all()}


def _answers(answers: Tensor, targets: Tensor, corpus: TaskCorpus) -> Answers:
    """One answer per text, in the order of the file; the chance is that of always naming the most frequent class."""
    order, classes, rows = corpus.validation_order(), corpus.classes, corpus.validation
    place = np.argsort(order, kind="stable")
    shares = torch.bincount(targets, minlength=len(classes)).double() / len(targets)
    numbers: Sequence[int] = rows.chosen.tolist()
    return Answers(
        tuple(
            Answer(
                id=f"data.validation:{numbers[int(order[at])]}",
                asked=hash_of(corpus.questions, numbers[int(order[at])]),
                answer=classes[int(answers[at])],
                wanted=classes[int(targets[at])],
                right=bool(answers[at] == targets[at]),
            )
            for at in place
        ),
        chance=float(shares.max()),
    )
