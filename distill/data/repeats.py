"""Training documents that nearly repeat validation text, counted while they are tokenized.

Texts that are equal are never on both sides. A text that differs by a word may be, and then the validation loss says
less of other text than it seems to. Nothing is left out here: what is found is one line, which names the setting that
leaves such documents out.

Not all is looked at: of the validation text the first :data:`CHARACTERS`, and of the training text as many at first,
then of as many again every second document, then every fourth, and so on, so that a large text costs little more.
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
"""Of validation text, and of training text in each stretch."""
SHARE = 0.8
"""Part of a validation document's words that a training document must have, in common runs of eight words."""
FEWEST = 16
"""Words below which a validation document is not compared: short texts are alike in form."""


Trains = Callable[[Item], bool]


@dataclass
class Found:
    """Training documents of a source that nearly repeat validation text.

    Attributes:
        num_compared: documents that were compared.
        num_repeated: those among them that were found.
        first: the first one, in words.
    """

    num_compared: int = 0
    num_repeated: int = 0
    first: str = ""

    def reset(self) -> None:
        """Forget what was found, as the source is read from its beginning."""
        self.num_compared, self.num_repeated, self.first = 0, 0, ""

    def line(self, key: str) -> str | None:
        """What to say of it; None if nothing was found.

        Args:
            key: of the source in the recipe, below ``data``.
        """
        if not self.num_repeated:
            return None
        return (
            f"data.{key}: {self.num_repeated:,} of {self.num_compared:,} documents that were compared nearly repeat "
            f"validation text ({self.first}); data.clean.decontaminate: [validation] leaves them out"
        )


class ValidationRepeats:
    """Counts documents as they pass.

    Args:
        texts: the sources of the run's text; what any of them validates on is compared.
    """

    def __init__(self, texts: Sequence[OneText]):
        self._texts = texts

    def watched(self, items: Iterable[Item], found: Found, trains: Trains = lambda item: True) -> Iterator[Item]:
        """The same items.

        Args:
            items: of one source.
            found: set to what was found among them.
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
    """Whether there is something to count.

    Args:
        texts: the sources of the run's text.
        is_cleaned: whether ``data.clean`` leaves out what repeats validation text.
    """
    sources = [source for text in texts for source in (text.data.train, text.data.validation) if source is not None]
    return not is_cleaned and not any(source.is_stream() or source.holds_ids() for source in sources)
