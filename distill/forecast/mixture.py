"""What can be said of a mixture before a run: shares, sizes, and about how often a training reads each source."""

from __future__ import annotations

from collections.abc import Iterator

from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.forecast.text import TextForecast


def about_mixture(mixture: Mixture, data: DataSpec, text: TextForecast) -> Iterator[str]:
    """A line per source."""
    shares = _shares(mixture, text)
    for name, source in mixture.sources.items():
        parts = [f"{name}: {source.kind}"]
        parts += [f"{shares[name]:.1%} of the tokens"] if shares else []
        size = text.sources.get(name)
        parts.append("size not known before it is read" if size is None else f"about {size:,.0f} tokens to train on")
        own = mixture.validation.get(name)
        parts.append(f"validation from {own.kind}" if own else f"{data.held_out:.0%} held out")
        yield ", ".join(parts)


def often_read(mixture: Mixture, num_tokens: float, text: TextForecast) -> str | None:
    """The sources that a training of so many tokens reads more often than the recipe allows; None: none of them.

    The run counts exactly and refuses it then; what is known before is a guess.
    """
    shares = _shares(mixture, text)
    times = {name: num_tokens * shares[name] / size for name, size in text.sources.items() if shares and size}
    many = [f"{name} about {often:.1f} times" for name, often in times.items() if often > mixture.max_repeats]
    if not many:
        return None
    return (
        f"reads {', '.join(many)} by that estimate; the run counts, and refuses more than {mixture.max_repeats:g} "
        "(data.train.max_repeats)"
    )


def _shares(mixture: Mixture, text: TextForecast) -> dict[str, float]:
    known = {name: max(1, round(size)) for name, size in text.sources.items() if size is not None}
    return mixture.shares(known) if mixture.weights is not None or len(known) == len(mixture.sources) else {}
