"""Standard errors of metrics by a bootstrap over rows: rows are drawn with replacement, again and again.

Closed forms over all samples at once, as a metric that is called once per sample takes seconds. With ``M`` the matrix
of counts (class that is wanted x class that is predicted):

    macro F1   = mean over classes c of  2 M_cc / (sum_j M_cj + sum_i M_ic),   classes that never occur left out
    Matthews   = (n tr M - t . p) / sqrt((n^2 - p . p)(n^2 - t . t)),   t = row sums, p = column sums, n = sum of M

Source: Efron 1979 (bootstrap); Gorodkin 2004 (Matthews correlation of several classes).
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 200
"""Samples; the relative error of a standard error from 200 is 5 %."""


def draws(num_rows: int) -> np.ndarray:
    """How often each row is in each sample, int64 [samples, rows]; the same each time."""
    random = np.random.default_rng(0)
    return np.stack(
        [np.bincount(random.integers(num_rows, size=num_rows), minlength=num_rows) for _ in range(RESAMPLES)]
    )


def of_ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Standard error of a sum over a sum, such as a mean over the tokens of rows.

    Args:
        numerators: of each row. [rows]
        denominators: of each row. [rows]
    """
    often = draws(len(numerators))
    return _deviation((often @ numerators) / np.maximum(often @ denominators, 1e-12))


def confusions(answers: np.ndarray, targets: np.ndarray, rows: np.ndarray, num_classes: int) -> np.ndarray:
    """The matrix of counts of each sample, [samples, wanted, predicted].

    Args:
        answers: predicted classes. int64 [predictions]
        targets: wanted classes. int64 [predictions]
        rows: of each prediction, from 0. int64 [predictions]
        num_classes: how many there are.
    """
    often, cells = draws(int(rows.max()) + 1), targets * num_classes + answers
    found = [np.bincount(cells, weights=one[rows], minlength=num_classes**2) for one in often]
    return np.stack(found).reshape(-1, num_classes, num_classes)


def macro_f1_error(counts: np.ndarray) -> float:
    """Standard error of macro F1. counts: from :func:`confusions`."""
    right = np.diagonal(counts, axis1=1, axis2=2)  # [samples, classes]
    both = counts.sum(1) + counts.sum(2)
    there = both > 0
    f1 = np.where(there, 2 * right / np.maximum(both, 1), 0)
    return _deviation(f1.sum(1) / np.maximum(there.sum(1), 1))


def matthews_error(counts: np.ndarray) -> float:
    """Standard error of the Matthews correlation. counts: from :func:`confusions`."""
    # [resamples, classes], the same, [resamples]
    wanted, predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    above = total * np.trace(counts, axis1=1, axis2=2) - (wanted * predicted).sum(1)
    spread = (total**2 - (predicted**2).sum(1)) * (total**2 - (wanted**2).sum(1))
    return _deviation(np.where(spread > 0, above / np.sqrt(np.maximum(spread, 1e-12)), 0))


def correlation_error(first: np.ndarray, second: np.ndarray) -> float:
    """Standard error of Pearson's correlation of two columns [rows]; of ranks it is that of Spearman's."""
    often = draws(len(first)).astype(float)
    total = often.sum(1)
    means = [(often @ column) / total for column in (first, second)]
    both = (often @ (first * second)) / total - means[0] * means[1]
    spreads = [(often @ column**2) / total - mean**2 for column, mean in zip((first, second), means, strict=True)]
    product = spreads[0] * spreads[1]
    return _deviation(np.where(product > 1e-24, both / np.sqrt(np.maximum(product, 1e-24)), np.nan))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs. [rows]"""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: np.ndarray = np.cumsum(counts)
    found: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return found


def _deviation(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
