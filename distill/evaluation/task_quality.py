"""How well a model does its task: metrics on the labels, each with its standard error, and answers row by row.

    classification         accuracy, macro F1, Matthews correlation
    token_classification   accuracy, macro F1, F1 of whole spans
    regression             Pearson and Spearman correlation
    masked_lm              accuracy at the masked tokens
    embedding              cosine with the teacher's vectors, shared neighbours, accuracy of a neighbour classifier

The metrics are those of torchmetrics. Their standard errors are by a bootstrap over rows (the error of an accuracy of
texts in closed form), because the tokens of a row are not independent.

Source: Matthews 1975; Tjong Kim Sang & De Meulder 2003 (F1 of spans).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from distill.evaluation import resampling
from distill.evaluation.neighbours import embedding_metrics
from distill.evaluation.quality import Predictions
from distill.evaluation.spans import span_counts
from distill.evaluation.tasks.base import Answer, Answers
from distill.numerics.statistics import standard_error

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
        return TaskQuality(_of_numbers(outputs[:, 0].double(), targets.double()))
    answers = outputs[:, 0].long()  # [predictions], as targets and rows
    right = (answers == targets).double()
    if kind == "classification":
        error = standard_error(int(right.sum()), len(right)) or 0.0
    else:  # several predictions of a row are not independent
        sums, counts = (np.bincount(rows, weights=one, minlength=int(rows.max()) + 1) for one in (right, None))
        error = resampling.of_ratio(sums, counts)
    found: Metrics = {"accuracy": (float(right.mean()), error)}
    if corpus.task.has_classes:
        found |= _of_classes(answers, targets, rows, len(corpus.classes))
    if kind == "token_classification":
        spans = span_counts(answers, targets, rows, corpus.classes)
        if spans is not None:
            hits, both = 2 * spans[:, 0].double(), (spans[:, 1] + spans[:, 2]).double()
            found["span_f1"] = (
                float(hits.sum() / both.sum().clamp(min=1)),
                resampling.of_ratio(hits.numpy(), both.numpy()),
            )
    return TaskQuality(_defined(found), _answers(answers, targets, corpus) if kind == "classification" else None)


def _of_numbers(scores: Tensor, labels: Tensor) -> Metrics:
    one, other = scores.numpy(), labels.numpy()
    return _defined(
        {
            "pearson": (float(pearson_corrcoef(scores, labels)), resampling.correlation_error(one, other)),
            "spearman": (
                float(spearman_corrcoef(scores, labels)),
                resampling.correlation_error(resampling.ranks(one), resampling.ranks(other)),
            ),
        }
    )


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
    counts = resampling.confusions(answers.numpy(), targets.numpy(), rows.numpy(), num_classes)
    f1 = multiclass_f1_score(answers, targets, num_classes, average="macro")
    matthews = multiclass_matthews_corrcoef(answers, targets, num_classes)
    return {
        "macro_f1": (float(f1), resampling.macro_f1_error(counts)),
        "matthews": (float(matthews), resampling.matthews_error(counts)),
    }


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
