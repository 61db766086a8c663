"""How alike two answers are."""

from __future__ import annotations

from collections import Counter

from distill.stages.synthesize.candidate import numbers_of, words_of


def token_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts it (arXiv 1606.05250); 0 to 1."""
    ours, theirs = Counter(words_of(given)), Counter(words_of(wanted))
    same = sum((ours & theirs).values())
    return 2 * same / (ours.total() + theirs.total()) if same else 0.0


def numbers_right(given: str, wanted: str) -> float | None:
    """Share of the numbers of the reference that the answer has; None if the reference has none."""
    theirs = numbers_of(wanted)
    return len(theirs & numbers_of(given)) / len(theirs) if theirs else None
