"""Metrics of tasks and their standard errors, compared with formulas, torchmetrics and other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_matthews_corrcoef

from distill.evaluation import resampling
from distill.evaluation.spans import span_counts, spans_of


def test_spans_are_those_of_conll() -> None:
    classes = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER", "I-PER"]
    assert spans_of(classes) == {("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 6)}
    assert spans_of(["O"]) == set()
    names = ("B-X", "I-X", "O")
    answers, targets = torch.tensor([0, 1, 2, 0, 2]), torch.tensor([0, 1, 2, 2, 0])
    counts = span_counts(answers, targets, torch.tensor([0, 0, 0, 1, 1]), names)
    assert counts.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert span_counts(answers, targets, torch.tensor([0, 0, 0, 1, 1]), ("a", "b", "c")) is None


def _classes() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    targets = random.integers(4, size=300)
    return np.where(random.random(300) < 0.7, targets, random.integers(4, size=300)), targets


def test_errors_of_class_metrics_are_those_of_the_metric_itself() -> None:
    """Drawn again and again with torchmetrics, sample by sample."""
    answers, targets = _classes()
    counts = resampling.confusions(answers, targets, np.arange(300), 4)
    often = resampling.draws(300)
    f1, matthews = [], []
    for one in often:
        at = np.repeat(np.arange(300), one)
        pair = torch.from_numpy(answers[at]), torch.from_numpy(targets[at])
        f1.append(float(multiclass_f1_score(*pair, 4, average="macro")))
        matthews.append(float(multiclass_matthews_corrcoef(*pair, 4)))
    assert resampling.macro_f1_error(counts) == pytest.approx(np.std(f1, ddof=1), rel=1e-4)
    assert resampling.matthews_error(counts) == pytest.approx(np.std(matthews, ddof=1), rel=1e-4)
    assert 0.01 < resampling.macro_f1_error(counts) < 0.05


def test_the_error_of_a_mean_over_tokens_counts_rows_as_whole() -> None:
    random = np.random.default_rng(2)
    right = random.random(400) < 0.8
    alone = resampling.of_ratio(right.astype(float), np.ones(400))
    assert alone == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.15)
    # ten equal tokens per row tell as much as one: the error stays, though there are ten times as many predictions
    assert resampling.of_ratio(10.0 * right, np.full(400, 10.0)) == pytest.approx(alone, rel=1e-9)


def test_errors_of_correlations() -> None:
    random = np.random.default_rng(3)
    first = random.normal(size=250)
    second = np.round(first + random.normal(size=250), 1)  # with ties
    below = (second[:, None] > second).sum(1)
    np.testing.assert_allclose(resampling.ranks(second), below + ((second[:, None] == second).sum(1) + 1) / 2)
    ranked = resampling.ranks(first), resampling.ranks(second)
    exact = spearman_corrcoef(torch.from_numpy(first), torch.from_numpy(second))
    assert np.corrcoef(*ranked)[0, 1] == pytest.approx(float(exact))
    r = np.corrcoef(first, second)[0, 1]
    assert resampling.correlation_error(first, second) == pytest.approx((1 - r**2) / np.sqrt(250), rel=0.25)
    assert resampling.correlation_error(np.ones(9), np.arange(9.0)) == 0  # not defined
