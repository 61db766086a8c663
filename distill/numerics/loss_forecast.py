"""Forecast of the validation loss at the end of a training, and of longer ones, from the validations so far.

    loss(step) = floor + gain * (progress + shift)**-exponent + noise * rate
    progress   = sum of the learning rates up to the step, divided by the peak learning rate, in steps
    rate       = learning rate at the step, divided by the peak learning rate

The first two terms are the usual power law, as a function of the sum of the learning rates instead of the number of
tokens, so that a decaying schedule slows it down (Tissue et al. 2024, arXiv:2408.11029, call the sum the forward area).
The shift accounts for the early phase of a training from random weights. The third term is the excess loss of SGD near
a minimum, which is proportional to the learning rate (Mandt et al. 2017, arXiv:1704.04289) and vanishes as the rate
decays. ``floor``, ``gain`` and ``noise`` are at least 0.

The exponent and the shift are taken from a grid. For each pair, and for each subset of the three factors that is not
0, the factors are fitted by linear least squares. The forecast is the average over all fits, weighted by their
likelihood; its interval contains the uncertainty of each fit. A change of the text or the losses during the training
cannot be predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.1, 3.0, 16)
SHIFTS = (0.0, 0.3, 1.0)
"""Values of the shift, as a fraction of the progress at the last validation."""
FEWEST = 5
"""Number of validations needed for a forecast: one more than the curve has parameters."""
JITTER = 0.004
"""Smallest standard error of a validation loss, relative to the loss; another order of the text changes it as much."""
MISFIT = 3.0
"""Factor on the variance of the residuals, as real curves do not follow the formula exactly."""
GRID = 2000
"""Number of points at which a schedule is evaluated."""
DRAWS = 400
"""Number of samples from the distribution of the parameters."""
HINDCASTS = (0.5, 0.75)
"""Fractions of the validations from which the last one is forecast, to test how well the curve fits."""
INTERVAL = (0.05, 0.95)
"""Quantiles that bound the forecast interval."""

Shape = tuple[float, float]
"""(exponent, shift) of a curve."""
Schedule = Callable[[int, int], float]
"""(step, number of steps) -> learning rate divided by its peak."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of the loss at the end of a training.

    Attributes:
        num_steps: number of steps of the training.
        loss: median, in nats per token.
        low, high: see :data:`INTERVAL`.
    """

    num_steps: int
    loss: float
    low: float
    high: float


def forecast(
    steps: Sequence[int],
    losses: Sequence[float],
    num_steps: int,
    schedule: Schedule,
    *,
    lengths: Sequence[int] = (),
    seed: int = 0,
) -> list[Forecast]:
    """Forecast the loss at the end of this training, or of trainings of other lengths with the same schedule.

    Args:
        steps: steps of the validations, counted from 1, ascending.
        losses: validation losses at these steps, in nats per token, positive.
        num_steps: number of steps of the training.
        schedule: schedule of the learning rate.
        lengths: numbers of steps to forecast; empty for ``num_steps``.
        seed: seed of the random samples.

    Returns:
        One forecast per length; empty if there are fewer than :data:`FEWEST` validations after the warm-up.
    """
    path = _Path.of(schedule, num_steps)
    warm = path.warm_up()
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if step > warm and np.isfinite(loss)]
    if len(kept) < FEWEST:
        return []
    at = np.array([step for step, _ in kept])
    found = np.array([loss for _, loss in kept])
    generator = np.random.default_rng(seed)
    drawn, stretch = _drawn(path, at, found, generator), _stretch(path, at, found, generator)
    results = []
    for length in lengths or (num_steps,):
        low, middle, high = _quantiles(drawn, _Path.of(schedule, length), length)
        results.append(
            Forecast(length, middle, max(0.0, middle - stretch * (middle - low)), middle + stretch * (high - middle))
        )
    return results


def _stretch(path: _Path, at: np.ndarray, found: np.ndarray, generator: np.random.Generator) -> float:
    """Factor (at least 1) that widens the intervals so that they would have contained the last validation loss.

    The curve is fitted to the first validations only, and the last one is forecast from it. The error is large if the
    training does not follow the curve, for example early in a training from random weights.
    """
    errors = []
    for share in HINDCASTS:
        known = max(FEWEST, round(share * len(at)))
        if known < len(at):
            low, middle, high = _quantiles(_drawn(path, at[:known], found[:known], generator), path, int(at[-1]))
            errors.append(
                abs(found[-1] - middle) / max(1e-9, (high - middle) if found[-1] > middle else (middle - low))
            )
    return max([1.0, *errors])


def _quantiles(drawn: list[tuple[Shape, np.ndarray]], path: _Path, step: int) -> tuple[float, float, float]:
    """Lower end, median and upper end of the loss at a step."""
    at = np.array([step])
    values = [float(path.features(at, shape)[0] @ factors) for shape, factors in drawn]
    low, middle, high = np.quantile(values, [INTERVAL[0], 0.5, INTERVAL[1]])
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class _Path:
    """Learning rate and progress of a training, at no more than :data:`GRID` of its steps."""

    steps: np.ndarray  # [points], counted from 1
    rates: np.ndarray  # [points]
    progress: np.ndarray  # [points]

    @classmethod
    def of(cls, schedule: Schedule, num_steps: int) -> _Path:
        steps = np.unique(np.linspace(1, num_steps, GRID).round().astype(int))
        rates = np.array([schedule(int(step) - 1, num_steps) for step in steps])
        between = (rates[1:] + rates[:-1]) / 2 * np.diff(steps)
        return cls(steps, rates, np.concatenate([rates[:1], rates[0] + np.cumsum(between)]))

    def warm_up(self) -> int:
        """The last step of the warm-up: the step before the learning rate first reaches its peak."""
        return int(self.steps[np.argmax(self.rates >= self.rates.max())]) - 1

    def features(self, at: np.ndarray, shape: Shape) -> np.ndarray:
        """The three terms without their factors: 1, the power of the progress, and the rate; [validations, 3]."""
        exponent, shift = shape
        progress = np.interp(at, self.steps, self.progress) + shift
        return np.stack([np.ones(len(at)), progress**-exponent, np.interp(at, self.steps, self.rates)], 1)


@dataclass(frozen=True)
class _Fit:
    """Least-squares fit of a subset of the three factors; the other factors are 0."""

    shape: Shape
    factors: np.ndarray  # [3]
    squares: float  # sum of squared residuals
    covariance: np.ndarray  # [3, 3], of the factors, if the variance of the residuals is 1


def _fits(shape: Shape, features: np.ndarray) -> list[_Fit]:
    """A fit for each subset of the factors, so that validations that fit several curves give a wide interval."""
    fits = []
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(3), count):
            part = features[:, chosen]
            own = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
            if (own < 0).any():
                continue
            factors, covariance = np.zeros(3), np.zeros((3, 3))
            factors[list(chosen)] = own
            covariance[np.ix_(chosen, chosen)] = np.linalg.pinv(part.T @ part)
            squares = float(((1 - part @ own) ** 2).sum())
            fits.append(_Fit(shape, factors, squares, covariance))
    return fits


def _drawn(
    path: _Path, at: np.ndarray, found: np.ndarray, generator: np.random.Generator
) -> list[tuple[Shape, np.ndarray]]:
    """Samples of (shape, factors) from their distribution given the validations."""
    # the errors are proportional to the loss, so every equation is divided by the loss
    reached = float(np.interp(at[-1], path.steps, path.progress))
    shapes = [(float(exponent), share * reached) for exponent in EXPONENTS for share in SHIFTS]
    fits = [fit for shape in shapes for fit in _fits(shape, path.features(at, shape) / found[:, None])]
    least, free = min(fit.squares for fit in fits), max(1, len(at) - 4)
    spread = MISFIT * max(least / free, JITTER**2)
    weights = np.array([np.exp((least - fit.squares) / (2 * spread)) for fit in fits])
    drawn = []
    for index in generator.choice(len(fits), DRAWS, p=weights / weights.sum()):
        # scaled inverse chi-squared, the posterior of the variance of the residuals
        fit, own = fits[index], spread * free / generator.chisquare(free)
        factors = generator.multivariate_normal(fit.factors, fit.covariance * own, check_valid="ignore")
        drawn.append((fit.shape, np.maximum(factors, 0.0)))
    return drawn
