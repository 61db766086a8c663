"""Counts training documents that nearly repeat validation text, while they are tokenized.

Equal texts are never on both sides. Near-duplicates may be on both sides; the validation loss is then too optimistic.
Nothing is left out here: the result is one line, which names the setting that leaves such documents out.

Only the first :data:`CHARACTERS` characters of validation text are used. Training text is sampled, so that a large text
costs little more: every document is compared until :data:`CHARACTERS` characters have been compared, then every second
one until as many again have been, then every fourth, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from distill.data.base import Document, Item
from distill.data.mixture_split import OneText
from distill.data.overlap import TestRows
from distill.data.words import words_of

CHARACTERS = 4_000_000
"""Number of characters of validation text, and of training text that are compared at each sampling rate."""
SHARE = 0.8
"""Fraction of a validation document's words that must be covered by word 8-grams of a training document."""
FEWEST = 16
"""Number of words below which a validation document is not compared, because short texts are alike in form."""


Trains = Callable[[Item], bool]


@dataclass
class Found:
    """Training documents of a source that nearly repeat validation text.

    Attributes:
        num_compared: number of documents that were compared.
        num_repeated: number of these that nearly repeat validation text.
        first: description of the first one.
    """

    num_compared: int = 0
    num_repeated: int = 0
    first: str = ""

    def reset(self) -> None:
        """Forget what was found, because the source is read from its beginning."""
        self.num_compared, self.num_repeated, self.first = 0, 0, ""

    def line(self, key: str) -> str | None:
        """The line for the user; None if nothing was found.

        Args:
            key: key of the source in the recipe, below ``data``.
        """
        if not self.num_repeated:
            return None
        return (
            f"data.{key}: {self.num_repeated:,} of {self.num_compared:,} documents that were compared nearly repeat "
            f"validation text ({self.first}); data.clean.decontaminate: [validation] leaves them out"
        )


class ValidationRepeats:
    """Counts near-duplicates of validation text among documents.

    Args:
        texts: the sources of the run's text; the validation text of all of them is compared.
    """

    def __init__(self, texts: Sequence[OneText]):
        self._texts = texts

    def watched(self, items: Iterable[Item], found: Found, trains: Trains = lambda item: True) -> Iterator[Item]:
        """Yield the items unchanged and count near-duplicates in ``found``.

        Args:
            items: items of one source.
            found: the counts, which are reset first.
            trains: whether an item is on the training side.
        """
        found.reset()
        num_documents, budget, stride = 0, CHARACTERS, 1
        for item in items:
            yield item
            if not isinstance(item, Document):
                continue
            num_documents += 1
            if num_documents % stride or not trains(item):
                continue
            found.num_compared += 1
            budget -= len(item.text)
            hit = self._rows.find(item, words_of(item.text))
            if hit is not None and hit.share >= SHARE:
                found.num_repeated += 1
                found.first = found.first or f"first {item.id}: {hit.share:.0%} of the words of {hit.id}"
            if budget <= 0:
                budget, stride = CHARACTERS, 2 * stride

    @cached_property
    def _rows(self) -> TestRows:
        return TestRows(self._validation())

    def _validation(self) -> Iterator[Document]:
        for text in self._texts:
            budget = CHARACTERS // len(self._texts)
            for item in text.split.validation():
                if budget <= 0:
                    break
                if isinstance(item, Document):
                    budget -= len(item.text)
                    if len(words_of(item.text)) >= FEWEST:
                        yield item


def can_repeat(texts: Sequence[OneText], *, is_cleaned: bool) -> bool:
    """Whether near-duplicates of validation text are to be counted.

    Args:
        texts: the sources of the run's text.
        is_cleaned: whether ``data.clean`` leaves out documents that repeat validation text.
    """
    sources = [source for text in texts for source in (text.data.train, text.data.validation) if source is not None]
    return not is_cleaned and not any(source.is_stream() or source.holds_ids() for source in sources)
