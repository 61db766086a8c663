"""Forecasts of a training's end: curves that are known, intervals that hold as often as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.numerics.loss_forecast import FEWEST, forecast
from distill.training.spec import OptimizerSpec

STEPS = 200
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded_trainings.json").read_text())
"""Validations of trainings that were run, and how they were: the quickstart's teacher, 40k to 240k tokens."""


def curve(seed: int, schedule: str) -> tuple[list[int], list[float], dict[int, float]]:
    """Validations of the first half of a training with an error of 0.4 %; true losses at the ends of trainings."""
    factor, generator = OptimizerSpec(schedule=schedule).factor, np.random.default_rng(seed)
    floor, gain, exponent, noise = (generator.uniform(*r) for r in ((0, 0.5), (0.5, 3), (0.3, 1.2), (0, 0.2)))

    def loss(step: int, length: int) -> float:
        rates = np.array([factor(at, length) for at in range(step)])
        return float(floor + gain * rates.sum() ** -exponent + noise * rates[-1])

    steps = list(range(12, STEPS // 2 + 1, 8))
    found = [loss(step, STEPS) * (1 + 0.004 * generator.standard_normal()) for step in steps]
    return steps, found, {length: loss(length, length) for length in (STEPS, 2 * STEPS)}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "linear"])
def test_the_hidden_half_is_within_the_interval_as_often_as_it_says(schedule: str) -> None:
    factor, held = OptimizerSpec(schedule=schedule).factor, 0
    for seed in range(8):
        steps, losses, ends = curve(seed, schedule)
        for one in forecast(steps, losses, STEPS, factor, lengths=[*ends]):
            held += one.low <= ends[one.num_steps] <= one.high
            assert one.low <= one.loss <= one.high
    assert held >= 12  # of 16, where 14.4 are expected


def test_the_forecast_is_near_where_the_curve_is_clear() -> None:
    factor = OptimizerSpec(schedule="constant").factor
    rates = np.cumsum([factor(step, STEPS) for step in range(STEPS)])
    steps = list(range(20, 101, 4))
    losses = [0.2 + 1.5 * rates[step - 1] ** -0.6 for step in steps]
    (end,) = forecast(steps, losses, STEPS, factor)
    assert end.loss == pytest.approx(0.2 + 1.5 * rates[-1] ** -0.6, rel=0.01)
    assert end.high - end.low < 0.05 * end.loss
    again = forecast(steps, losses, STEPS, factor)
    assert again == [end]


def test_a_decaying_rate_is_expected_to_help() -> None:
    """With the first half of a cosine run; a power law in tokens alone would end too high."""
    steps, losses, ends = curve(3, "cosine")
    (end,) = forecast(steps, losses, STEPS, OptimizerSpec(schedule="cosine").factor)
    assert end.loss < losses[-1]
    assert end.loss == pytest.approx(ends[STEPS], rel=0.06)


@pytest.mark.parametrize("one", RECORDED, ids=[f"{one['run']} {one['column']}" for one in RECORDED])
def test_recorded_trainings_end_where_their_first_half_says(one: dict[str, Any]) -> None:
    """Real ones, of a small student: from a cut and from random weights, by several losses and schedules."""
    factor, length = OptimizerSpec(schedule=one["schedule"]).factor, one["num_steps"]
    half = [(step, loss) for step, loss in zip(one["steps"], one["losses"], strict=True) if step <= length / 2]
    (end,) = forecast([step for step, _ in half], [loss for _, loss in half], length, factor)
    assert end.low <= one["losses"][-1] <= end.high
    assert end.loss == pytest.approx(one["losses"][-1], rel=0.15)
    assert end.high < half[-1][1] * 1.2  # it says something: the interval does not reach far above what is measured


def test_nothing_is_said_of_too_few_validations() -> None:
    factor = OptimizerSpec().factor
    steps = [20, 40, 60, 80, 100]
    assert len(steps) == FEWEST
    assert forecast(steps, [5.0, 4.0, 3.5, 3.2, 3.0], STEPS, factor)
    assert forecast(steps[1:], [4.0, 3.5, 3.2, 3.0], STEPS, factor) == []
    assert forecast([2, *steps[1:]], [5.0, 4.0, 3.5, 3.2, 3.0], STEPS, factor) == []  # one is in the warm-up
    assert forecast(steps, [float("nan"), 4.0, 3.5, 3.2, 3.0], STEPS, factor) == []
