"""How often a training reads each source of a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.data.mixture import Mixture
from distill.training.spec import BudgetSpec

if TYPE_CHECKING:
    from distill.stages.session import StageContext


def passes_of(context: StageContext, budget: BudgetSpec) -> dict[str, float]:
    """Name of each source -> passes over it in a training; none where the text is no mixture.

    Args:
        context: of the stage.
        budget: how long it trains.

    Raises:
        InputError: more than the recipe allows.
    """
    mixture = context.session.data.train
    if not isinstance(mixture, Mixture) or not budget.steps(1):
        return {}
    corpus = context.session.corpus()
    times = corpus.passes(corpus.steps_of(budget) * budget.batch_size)
    mixture.check_repeats(times)
    return {name: round(often, 4) for name, often in times.items()}


def say_passes(context: StageContext, budget: BudgetSpec) -> None:
    """Print :func:`passes_of` before a run.

    Raises:
        InputError: more than the recipe allows.
    """
    if context.session.awaits_rows:
        return
    times = passes_of(context, budget)
    if any(times.values()):
        context.say(f"{context.name}: {in_words(times)}")


def in_words(times: dict[str, float]) -> str:
    """For people."""
    return "passes over each source: " + ", ".join(f"{name} {often:.2f}" for name, often in times.items())
