"""Statistics of task scores: standard errors, paired differences, and exact tests that also hold for few items.

All models of a table answer the same items, so two models are compared item by item. Only discordant items, which
exactly one of the two models answers correctly, carry information on the difference. Of ``n`` items, ``b`` are answered
correctly by the first model alone (lost), and ``c`` by the second model alone (gained):

    difference = (c - b) / n
    interval   = Wald's, with half an item added to each of the four cells    (Agresti & Min 2005, Stat. Med. 24:729)
    p          = min(1, 2 * sum over k <= min(b, c) of C(b + c, k) / 2**(b + c))                (exact McNemar test)

Scores that are no yes or no, such as nats per token, are compared by their differences ``d`` per item:

    difference = mean(d)
    interval   = percentiles of the mean over items that are drawn again with replacement     (bootstrap, Efron 1979)
    p          = share of all changes of signs of d whose mean is as far from 0 as that of d  (permutation test)

Pure Python, so that a report needs no further package; the tests compare with scipy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
"""Confidence level of all intervals."""
DRAWS = 10_000
"""Number of random draws of a bootstrap or a permutation test."""
POWER = 0.8
"""Power of the test for the difference that :meth:`Paired.smallest` returns."""


def standard_error(num_right: int, num_items: int) -> float | None:
    """Standard error of an accuracy, ``sqrt(p (1 - p) / (n - 1))``; None for fewer than two items."""
    if num_items < 2:
        return None
    share = num_right / num_items
    return math.sqrt(share * (1 - share) / (num_items - 1))


def z_of(confidence: float) -> float:
    """Half-width of an interval in standard errors: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact McNemar test: under the null hypothesis lost and gained are equally likely.

    Args:
        lost: number of items that only the first model answers correctly.
        gained: number of items that only the second model answers correctly.
    """
    changed = lost + gained
    tail = ways = 1  # C(changed, 0), and then the sum up to C(changed, k)
    for k in range(min(lost, gained)):
        ways = ways * (changed - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests (Holm 1979), in the order of ``ps``; at most 1."""
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


@dataclass(frozen=True)
class Paired:
    """Counts of the answers of two models to the same items.

    Attributes:
        items: number of items.
        both: items that both models answer correctly.
        lost: items that only the first model answers correctly.
        gained: items that only the second model answers correctly.
    """

    items: int
    both: int
    lost: int
    gained: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Count from two lists: whether each model answers each item correctly, in the same order of items.

        Raises:
            ValueError: the lists differ in length or are empty.
        """
        if len(first) != len(second) or not first:
            raise ValueError(f"{len(first)} and {len(second)} items, expected the same number, at least one")
        pairs = list(zip(first, second, strict=True))
        return cls(len(pairs), pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True)))

    @property
    def difference(self) -> float:
        """Accuracy of the second model minus that of the first."""
        return (self.gained - self.lost) / self.items

    @property
    def p(self) -> float:
        """See :func:`mcnemar`."""
        return mcnemar(self.lost, self.gained)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Confidence interval of the difference; not degenerate even if no item is discordant."""
        b, c, n = self.lost + 0.5, self.gained + 0.5, self.items + 2
        reach = z_of(confidence) * math.sqrt(b + c - (c - b) ** 2 / n) / n
        middle = (c - b) / n
        return max(-1.0, middle - reach), min(1.0, middle + reach)

    def smallest(self, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> float:
        """The detectable difference: the smallest one that is significant at ``alpha`` with this power.

        It is ``z(1 - alpha/2) + z(power)`` standard errors of the difference, with the observed share of discordant
        items, and at least the smallest number of discordant items for which the exact test can be significant (6 at
        0.05), divided by the number of items.

        Args:
            alpha: significance level; divide it by the number of tests.
            power: probability that a difference of this size is significant.
        """
        b, c, n = self.lost + 0.5, self.gained + 0.5, self.items + 2
        error = math.sqrt(b + c - (c - b) ** 2 / n) / n
        least = 1
        while 2 / 2**least > alpha:
            least += 1
        reach = (z_of(1 - alpha) + NormalDist().inv_cdf(power)) * error
        return min(1.0, max(reach, least / self.items))

    def recovery(self, chance: float) -> tuple[float, float] | None:
        """Chance-corrected recovery ``(second - chance) / (first - chance)`` and its standard error.

        With four choices, an accuracy of 28 % after 30 % is a recovery of 60 %, not of 93 %. The standard error is that
        of a ratio of two means over the same items, by the delta method.

        Args:
            chance: accuracy of random guessing, 0 to 1.

        Returns:
            None if the accuracy of the first model is not more than two standard errors above chance.
        """
        first, second = (self.both + self.lost) / self.items, (self.both + self.gained) / self.items
        error = standard_error(self.both + self.lost, self.items)
        if error is None or not first - chance > 2 * error:
            return None
        ratio = (second - chance) / (first - chance)
        covariance = self.both / self.items - first * second
        variance = second * (1 - second) + ratio**2 * first * (1 - first) - 2 * ratio * covariance
        return ratio, math.sqrt(max(0.0, variance) / (self.items - 1)) / (first - chance)


@dataclass(frozen=True)
class PairedMeans:
    """Scores of two models on the same items, which may be any numbers.

    Attributes:
        differences: score of the second model minus that of the first, per item.
    """

    differences: tuple[float, ...]

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> PairedMeans:
        """From two lists of scores in the same order of items.

        Raises:
            ValueError: the lists differ in length or are empty.
        """
        if len(first) != len(second) or not first:
            raise ValueError(f"{len(first)} and {len(second)} items, expected the same number, at least one")
        return cls(tuple(b - a for a, b in zip(first, second, strict=True)))

    @property
    def difference(self) -> float:
        """Mean of the second model minus that of the first."""
        return math.fsum(self.differences) / len(self.differences)

    def interval(self, confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the difference, by percentiles."""
        dice, n = random.Random(seed), len(self.differences)
        means = sorted(math.fsum(dice.choices(self.differences, k=n)) / n for _ in range(DRAWS))
        cut = int((1 - confidence) / 2 * DRAWS)
        return means[cut], means[DRAWS - 1 - cut]

    def p(self, seed: int = 0) -> float:
        """Two-sided p-value: under the null hypothesis each difference has either sign with equal probability.

        Exact for up to 12 items; for more items with :data:`DRAWS` random changes of signs, the observed one included.
        """
        sizes, observed = [abs(one) for one in self.differences], abs(math.fsum(self.differences)) - 1e-12
        n = len(sizes)
        if n <= 12:
            sums = [math.fsum(s if k >> i & 1 else -s for i, s in enumerate(sizes)) for k in range(2**n)]
            return sum(abs(one) >= observed for one in sums) / len(sums)
        dice, far = random.Random(seed), 1
        for _ in range(DRAWS):
            signs = dice.getrandbits(n)
            far += abs(math.fsum(s if signs >> i & 1 else -s for i, s in enumerate(sizes))) >= observed
        return far / (DRAWS + 1)
