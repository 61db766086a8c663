"""Values of scipy, which the tests of statistics compare with; ``python -m tests.numerics.scipy_values`` writes them.

They are recorded, because torchmetrics imports scipy in every process where it is installed, which takes a second.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


def changes() -> list[tuple[int, int]]:
    """Sixty pairs of lost and gained answers."""
    generator = random.Random(0)
    pairs = [(generator.randrange(0, 90), generator.randrange(0, 90)) for _ in range(60)]
    return [pair for pair in pairs if sum(pair)]


def answers() -> tuple[list[bool], list[bool]]:
    """Right or wrong answers of two models to 400 questions; the second often answers as the first."""
    generator = random.Random(1)
    first = [generator.random() < 0.7 for _ in range(400)]
    return first, [one if generator.random() < 0.8 else not one for one in first]


def measured() -> list[tuple[list[float], list[float]]]:
    """Two figures per item, of few items and of many; the second is larger in the mean."""
    generator, pairs = random.Random(4), []
    for items, shift in ((9, 0.4), (40, 0.2)):
        first = [generator.gauss(0, 1) for _ in range(items)]
        pairs.append((first, [value + shift + generator.gauss(0, 0.5) for value in first]))
    return pairs


def _paired_means(first: list[float], second: list[float]) -> dict[str, Any]:
    """The permutation test (exact for few items) and the bootstrap interval of the mean difference."""
    import numpy as np
    from scipy import stats

    differences = [b - a for a, b in zip(first, second, strict=True)]
    exchanged = stats.permutation_test(
        (second, first),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2 ** len(first) if len(first) < 12 else 9999,
        rng=0,
    )
    interval = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=9999, rng=0)
    return {"p": exchanged.pvalue, "interval": list(interval.confidence_interval)}


def main() -> None:
    """Ask scipy and write the file."""
    import scipy
    from scipy import stats

    first, second = ([float(right) for right in one] for one in answers())
    values = {
        "scipy": scipy.__version__,
        "binomtest": [stats.binomtest(lost, lost + gained).pvalue for lost, gained in changes()],
        "norm.ppf(0.975)": stats.norm.ppf(0.975),
        "ttest_rel": stats.ttest_rel(second, first).statistic,
        "sem": stats.sem(first),
        "paired means": [_paired_means(*pair) for pair in measured()],
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
