"""Metrics of sentence embeddings: agreement with a teacher's, and a nearest-neighbour classifier.

    embedding_cosine    mean cosine of the two models' vectors of a text
    neighbours_shared   share of the K nearest texts of a text that are also among the teacher's K nearest
    pair_spearman       Spearman correlation of the cosines of random pairs of texts, student against teacher
    knn_accuracy        accuracy of the majority of the K nearest training texts, by task.label

Source: Reimers & Gurevych 2019, arXiv 1908.10084 (Spearman correlation of cosines).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from distill.core.stop import stoppable
from distill.data import loader
from distill.data.loader import alike, evenly
from distill.data.task_corpus import TaskCorpus
from distill.data.text_rows import TextRows
from distill.evaluation.quality import Predictions
from distill.numerics.statistics import standard_error

K_SHARED, K_CLASSIFIER = 10, 15
PAIRS = 20_000
MOST_INDEXED = 20_000
"""Training texts that the classifier looks at, at most."""


def embedding_metrics(
    own: Predictions, teacher: Predictions | None, corpus: TaskCorpus, batch_size: int
) -> dict[str, tuple[float, float]]:
    """Name of a metric -> (value, standard error).

    Args:
        own: of what is measured.
        teacher: of its teacher, or None.
        corpus: the data.
        batch_size: rows of a batch.
    """
    ours = embeddings_of(own, corpus.validation, corpus.validation_order(), batch_size)  # [texts, channels]
    found: dict[str, tuple[float, float]] = {}
    if teacher is not None:
        theirs = embeddings_of(teacher, corpus.validation, corpus.validation_order(), batch_size)
        if theirs.shape == ours.shape:
            found["embedding_cosine"] = _mean((ours * theirs).sum(-1))
        if len(ours) > K_SHARED:
            found["neighbours_shared"] = _mean(_shared(ours, theirs))
            found["pair_spearman"] = _spearman(ours, theirs)
    if corpus.train.file.classes:
        found["knn_accuracy"] = _knn(own, ours, corpus, batch_size)
    return found


def embeddings_of(own: Predictions, rows: TextRows, order: np.ndarray, batch_size: int) -> Tensor:
    """Vectors of length 1 of some rows, in their order in ``order``, fp32 [rows, channels]."""
    batches = loader.loader(rows, loader.in_lists(order, batch_size), 0)
    found = [own(batch)(slice(0, len(batch["mask"]))).float().cpu() for batch in stoppable(batches)]
    vectors = torch.nn.functional.normalize(torch.cat(found), dim=-1)
    return vectors[torch.from_numpy(np.argsort(order, kind="stable"))]


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return float(values.mean()), error


def _nearest(texts: Tensor, among: Tensor, number: int, *, same: bool) -> Tensor:
    """Indices of the nearest vectors, int64 [texts, number]; with ``same``, the text itself is left out."""
    found = []
    for start in range(0, len(texts), 1024):
        cosines = texts[start : start + 1024] @ among.T  # [chunk, among]
        if same:
            at = torch.arange(len(cosines))
            cosines[at, start + at] = -2.0
        found.append(cosines.topk(min(number, among.shape[0]), -1).indices)
    return torch.cat(found)


def _shared(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each text, the share of its neighbours that both models name. [texts]"""
    one, other = (_nearest(vectors, vectors, K_SHARED, same=True) for vectors in (ours, theirs))
    return (one.unsqueeze(2) == other.unsqueeze(1)).any(2).double().mean(1)


def _spearman(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of random pairs; its standard error by Fisher's transformation, 1.06 (1 - r**2) / sqrt(texts)."""
    random = np.random.default_rng(0)
    first, second = (torch.from_numpy(random.integers(len(ours), size=PAIRS)) for _ in range(2))
    first, second = first[first != second], second[first != second]
    cosines = [(vectors[first] * vectors[second]).sum(-1).double() for vectors in (ours, theirs)]
    r = float(spearman_corrcoef(*cosines))
    return r, 1.06 * (1 - r**2) / min(len(first), len(ours)) ** 0.5


def _knn(own: Predictions, ours: Tensor, corpus: TaskCorpus, batch_size: int) -> tuple[float, float]:
    train, wanted = corpus.train, torch.from_numpy(_labels(corpus.validation))
    chosen = evenly(len(train), MOST_INDEXED)
    order = alike(train, chosen)
    index = embeddings_of(own, train, order, batch_size)  # [count, channels], by rising row number
    labels = torch.from_numpy(_labels(train)[chosen])
    near = labels[_nearest(ours, index, K_CLASSIFIER, same=False)]  # [texts, K]
    votes = torch.nn.functional.one_hot(near, len(train.file.classes)).sum(1)  # [texts, classes]
    right = int((votes.argmax(-1) == wanted).sum())
    return right / len(wanted), standard_error(right, len(wanted)) or 0.0


def _labels(rows: TextRows) -> np.ndarray:
    """The class of each row, int64 [rows]."""
    found: np.ndarray = np.asarray(rows.file.array("targets"))[rows.chosen]
    return found
