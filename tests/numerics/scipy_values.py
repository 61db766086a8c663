"""Values of scipy, which the tests of statistics compare with; ``python -m tests.numerics.scipy_values`` writes them.

They are recorded, because torchmetrics imports scipy in every process where it is installed, which takes a second.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

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
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
