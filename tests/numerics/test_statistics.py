"""Statistics of paired answers: known cases, scipy as the reference, and coverage that is counted."""

from __future__ import annotations

import json
import math
import random
from statistics import NormalDist

import pytest

from distill.numerics.statistics import Paired, PairedMeans, holm, mcnemar, standard_error, z_of
from tests.numerics.scipy_values import FILE, answers, changes, measured

KNOWN = [  # (lost, gained, p of scipy.stats.binomtest(lost, lost + gained).pvalue)
    (0, 0, 1.0),
    (5, 5, 1.0),
    (0, 5, 0.0625),
    (0, 6, 0.03125),
    (12, 3, 0.03515625),
    (121, 59, 4.4344492637551645e-06),
]


@pytest.mark.parametrize(("lost", "gained", "p"), KNOWN)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_scipy_agrees() -> None:
    scipy = json.loads(FILE.read_text(encoding="utf-8"))
    for (lost, gained), p in zip(changes(), scipy["binomtest"], strict=True):
        assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-9)
    assert z_of(0.95) == pytest.approx(scipy["norm.ppf(0.975)"], rel=1e-9)
    first, second = answers()
    paired = Paired.of(first, second)
    assert paired.difference == pytest.approx(sum(second) / 400 - sum(first) / 400)
    # Wald's standard error with half an item added to each cell is that of the paired t test but for the halves
    low, high = paired.interval()
    assert (high - low) / 2 / z_of(0.95) == pytest.approx(paired.difference / scipy["ttest_rel"], rel=0.03)
    assert standard_error(sum(first), 400) == pytest.approx(scipy["sem"], rel=1e-9)


def test_many_changes_do_not_overflow() -> None:
    assert mcnemar(6000, 6000) == 1.0
    assert mcnemar(6000, 6400) == pytest.approx(0.000339136401230149, rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # the example of every textbook
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_recovery_is_above_chance() -> None:
    paired = Paired(items=1000, both=250, lost=350, gained=100)  # 60 % and 35 % with four choices
    kept = paired.recovery(0.25)
    assert kept is not None
    assert kept[0] == pytest.approx(0.10 / 0.35)
    assert Paired(100, 20, 8, 5).recovery(0.25) is None  # 28 % of 100 items may be chance


def test_error_of_recovery_is_that_of_many_samples() -> None:
    generator, ratios = random.Random(1), []
    cells = random.Random(2).choices([(1, 1), (1, 0), (0, 1), (0, 0)], [50, 20, 8, 22], k=800)
    for _ in range(400):
        drawn = generator.choices(cells, k=800)
        kept = Paired.of([bool(a) for a, _ in drawn], [bool(b) for _, b in drawn]).recovery(0.25)
        assert kept is not None
        ratios.append(kept[0])
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((one - mean) ** 2 for one in ratios) / (len(ratios) - 1))
    whole = Paired.of([bool(a) for a, _ in cells], [bool(b) for _, b in cells]).recovery(0.25)
    assert whole is not None
    assert whole[1] == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize(("items", "shares"), [(40, (4, 1)), (100, (10, 10)), (300, (30, 12))])
def test_interval_holds_the_difference_as_often_as_it_says(items: int, shares: tuple[int, int]) -> None:
    generator, (lost, gained) = random.Random(items), shares
    held = 0
    for _ in range(1000):
        drawn = generator.choices("bcn", [lost, gained, items - lost - gained], k=items)
        low, high = Paired(items, 0, drawn.count("b"), drawn.count("c")).interval()
        held += low <= (gained - lost) / items <= high
    assert 925 <= held <= 985


def test_smallest_difference_is_found_as_often_as_it_says() -> None:
    """A difference of that size is significant in about 80 of 100 samples."""
    paired, generator = Paired(items=1000, both=500, lost=60, gained=60), random.Random(3)
    smallest = paired.smallest()
    assert smallest == pytest.approx((NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) * 0.011, rel=0.02)
    lost = round(60 + 500 * smallest)
    found = 0
    for _ in range(300):
        drawn = generator.choices("bcn", [lost, 120 - lost, 880], k=1000)
        found += mcnemar(drawn.count("b"), drawn.count("c")) <= 0.05
    assert 210 <= found <= 260


def test_few_items_show_nothing_below_what_the_test_can_find() -> None:
    assert Paired(items=50, both=25, lost=0, gained=0).smallest() >= 6 / 50
    low, high = Paired(items=50, both=25, lost=0, gained=0).interval()
    assert low < 0 < high


def test_pairs_need_the_same_items() -> None:
    with pytest.raises(ValueError, match="3 and 2 items"):
        Paired.of([True] * 3, [True] * 2)
    assert standard_error(1, 1) is None


def test_paired_means_against_scipy() -> None:
    scipy = json.loads(FILE.read_text(encoding="utf-8"))["paired means"]
    for (first, second), found in zip(measured(), scipy, strict=True):
        pairs = PairedMeans.of(first, second)
        assert pairs.difference == pytest.approx((sum(second) - sum(first)) / len(first))
        assert pairs.p() == pytest.approx(found["p"], abs=1e-9 if len(first) < 12 else 0.02)
        assert pairs.interval() == pytest.approx(tuple(found["interval"]), abs=0.03)
        assert pairs.interval() == pairs.interval()
    assert PairedMeans.of([1.0, 2.0], [1.0, 2.0]).p() == 1.0
    with pytest.raises(ValueError, match="2 and 1 items"):
        PairedMeans.of([1.0, 2.0], [1.0])
