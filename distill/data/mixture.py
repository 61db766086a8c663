"""Several sources as one text; the weight of each is its fraction of the training tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.source import suggest
from distill.data import SOURCES
from distill.data.base import Item, SourceSpec

MAX_REPEATS = 4.0
"""Number of passes after which repeated text is worth much less than new text: Muennighoff et al. 2023, arXiv
2305.16264."""


class Mixture(SourceSpec):
    """Several sources, each with a share of the training tokens; texts and conversations may stand side by side."""

    kind: Literal["mixture"] = "mixture"
    sources: dict[str, Annotated[SourceSpec, SOURCES]] = Field(min_length=1)
    """Name -> source of any kind except a mixture or a stream."""
    weights: dict[str, float] | None = None
    """Name -> share of the training tokens, such as {chat: 0.7, books: 0.3}; positive numbers, which are divided by
    their sum. Null: proportional to token counts."""
    temperature: float = Field(1.0, gt=0)
    """Instead of weights: shares proportional to tokens ** (1 / temperature). 1: proportional to token counts; larger:
    more of small sources."""
    max_repeats: float = Field(MAX_REPEATS, gt=0)
    """Largest number of passes over a source; a training that would make more is refused before the run."""
    validation: dict[str, Annotated[SourceSpec, SOURCES]] = Field({})
    """Name -> a validation source of its own; for the other sources, a part of the training text is held out
    (data.held_out)."""

    @model_validator(mode="before")
    @classmethod
    def _no_mixture_inside(cls, value: Any) -> Any:
        named = {**value.get("sources", {}), **value.get("validation", {})} if _are_mappings(value) else {}
        for name, source in named.items():
            if source == "mixture" or (isinstance(source, dict) and source.get("kind") == "mixture"):
                raise ValueError(f"{name} is a mixture itself; name its sources here, with weights of their own")
        return value

    @model_validator(mode="after")
    def _names_fit(self) -> Mixture:
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", name):
                raise ValueError(f"{name!r} cannot be the name of a source (at most 40 letters, digits and _)")
        for key, named in (("weights", self.weights or {}), ("validation", self.validation)):
            for name in named:
                if name not in self.sources:
                    raise ValueError(f"{key}: no source {name!r}{suggest(name, list(self.sources))}")
        return self

    @model_validator(mode="after")
    def _weights_are_shares(self) -> Mixture:
        if self.weights is None:
            return self
        if self.temperature != 1.0:
            raise ValueError("temperature has no effect beside weights; remove one of the two")
        for name in self.sources:
            if not self.weights.get(name, 0.0) > 0 or math.isinf(self.weights[name]):
                raise ValueError(
                    f"weights: {name} needs a share above 0 (got {self.weights.get(name, 'none')}); a source without "
                    "a share is not read, so remove it"
                )
        return self

    @model_validator(mode="after")
    def _all_are_stored(self) -> Mixture:
        for name, source in {**self.sources, **self.validation}.items():
            if source.is_stream():
                raise ValueError(
                    f"{name} is a stream, whose tokens nobody has counted; weights need to know them: set "
                    "streaming: false"
                )
        return self

    @model_validator(mode="after")
    def _ids_stand_alone(self) -> Mixture:
        every = {**self.sources, **{f"validation.{name}": source for name, source in self.validation.items()}}
        ids = [name for name, source in every.items() if source.holds_ids()]
        if ids and (texts := [name for name in every if name not in ids]):
            raise ValueError(f"{ids[0]} is token ids and {texts[0]} is text; mix sources of one of the two alone")
        return self

    def shares(self, num_tokens: Mapping[str, int]) -> dict[str, float]:
        """The share of each source in the training tokens, of 1.

        Args:
            num_tokens: source name -> number of its tokens.
        """
        most = max(num_tokens.values(), default=1)  # normalise first to avoid float overflow of large powers
        weights = self.weights or {name: (num_tokens[name] / most) ** (1 / self.temperature) for name in self.sources}
        return {name: weights[name] / sum(weights.values()) for name in self.sources}

    def documents(self) -> Iterator[Item]:
        """Yield the documents of one source after the other."""
        for source in self.sources.values():
            yield from source.documents()

    def fingerprint(self) -> str:
        """A hash of the content of the sources; weights do not matter."""
        named = [self.sources, self.validation]
        return hash_of([{name: source.identity() for name, source in some.items()} for some in named])

    def identity(self) -> str:
        """A hash of everything that changes the text or its order; ``max_repeats`` does not."""
        return hash_of(self.fingerprint(), self.weights, self.temperature)

    def num_bytes(self) -> int | None:
        """Total size of all sources; None if one is unknown."""
        sizes = [source.num_bytes() for source in self.sources.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def holds_conversations(self) -> bool:
        """Whether one of the sources yields conversations."""
        return any(source.holds_conversations() for source in [*self.sources.values(), *self.validation.values()])

    def drops_rows(self) -> bool:
        """Whether one of the sources may yield unusable rows."""
        return any(source.drops_rows() for source in [*self.sources.values(), *self.validation.values()])

    def holds_ids(self) -> bool:
        """Whether one of the sources yields token ids."""
        return any(source.holds_ids() for source in [*self.sources.values(), *self.validation.values()])

    def paths(self) -> list[str]:
        """The paths of all sources."""
        return [path for source in [*self.sources.values(), *self.validation.values()] for path in source.paths()]

    def texts(self) -> list[str]:
        """Names of the sources that yield no conversations."""
        return [name for name, source in self.sources.items() if not source.holds_conversations()]

    def check_repeats(self, repeats: Mapping[str, float]) -> None:
        """Check that a training does not read a source too often.

        Args:
            repeats: source name -> number of passes over it.

        Raises:
            InputError: a source would be read too often; the message names each of them and what to do.
        """
        if many := {name: times for name, times in repeats.items() if times > self.max_repeats}:
            often = ", ".join(f"{name} {times:.1f} times" for name, times in many.items())
            worst = max(many.values())
            raise InputError(
                f"data.train: the training would read {often}, data.train.max_repeats is {self.max_repeats:g}; give "
                f"these sources more text or less weight, train on at most {self.max_repeats / worst:.0%} of the "
                f"tokens, or set max_repeats: {math.ceil(worst)}"
            )


def _are_mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key, {}), dict) for key in ("sources", "validation"))
